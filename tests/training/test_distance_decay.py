"""Far pairs score lower: by each head's decay, evenly from the reach on. Only decays learn from long prompts."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe import MoERouterPress
from kvpress_moe.codes.precision import menu_of
from kvpress_moe.errors import CheckpointError
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import load_routers, save_routers, weights_hash
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.distance_decay import DecayTuning
from kvpress_moe.training.end_to_end import EndToEnd
from kvpress_moe.training.trainer import long_prompts, max_tokens, train
from kvpress_moe.training.tuning_samples import TuningSample, reader
from tests.tiny import calibrated_routers, decoder, prefill, tokens
from tests.training.test_end_to_end import CONFIG as TUNED

CONFIG = replace(TUNED, samples=2, length=256, long_samples=3)


def scores_of(model, routers, input_ids, **settings):
    """What the press gives each layer's pairs, (L, H, S)."""
    found = []

    class Noting(MoERouterPress):
        def mix(self, call, routing):
            found.append(super().mix(call, routing)[0])
            return found[-1][None]

    prefill(model, input_ids, Noting(router=routers, compression_ratio=0.5, cache_aware=False, **settings))
    return torch.stack(found)


def test_scores_fall_evenly_with_the_distance_beyond_the_reach(llama):
    routers = calibrated_routers(llama)
    input_ids = tokens(80)
    fading = scores_of(llama, routers, input_ids)
    decays = torch.stack([layer.calibration.decay.detach().clone() for layer in routers.layers])
    for layer in routers.layers:
        torch.nn.init.zeros_(layer.calibration.decay)
    plain = scores_of(llama, routers, input_ids)
    for layer_idx, (ours, before) in enumerate(zip(fading, plain, strict=True)):
        for head in range(ours.shape[0]):
            for position in range(80):
                beyond = max(0, 79 - position - 16)
                expected = before[head, position] - decays[layer_idx, head] * beyond / 1024
                assert_close(ours[head, position], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fading, plain)


def test_prompts_within_the_reach_are_judged_as_before(llama):
    routers = calibrated_routers(llama)
    short = scores_of(llama, routers, tokens(17))
    for layer in routers.layers:
        torch.nn.init.zeros_(layer.calibration.decay)
    assert torch.equal(short, scores_of(llama, routers, tokens(17)))


def call_of(llama, hidden, keys, **kwargs):
    return LayerCall(decoder(llama).layers[0].self_attn, hidden, keys, keys, None, kwargs)


def test_distances_are_those_of_the_prompt(llama):
    hidden, keys = torch.zeros(1, 10, 4), torch.zeros(1, 1, 10, 4)
    assert call_of(llama, hidden, keys).distances.tolist() == [list(range(9, -1, -1))]
    later = torch.arange(5, 15)[None]  # positions need not start at 0
    assert call_of(llama, hidden, keys, position_ids=later).distances.tolist() == [list(range(9, -1, -1))]
    for first in (0, 2, 6):  # ChunkPress
        chunk = call_of(llama, hidden[:, first : first + 4], keys[:, :, first : first + 4], hidden_states=hidden)
        assert chunk.distances.tolist() == [[9 - first - at for at in range(4)]]


def test_pairs_whose_place_is_unknown_do_not_fade(llama):
    hidden, keys = torch.zeros(1, 10, 4), torch.zeros(1, 1, 10, 4)
    left = call_of(llama, hidden[:, 8:], keys, position_ids=torch.tensor([[8, 9]]))  # of a cache, by another press
    assert not left.distances.any()
    gathered = call_of(llama, hidden[:, [7, 1, 5]], keys[:, :, [7, 1, 5]], hidden_states=hidden)  # BlockPress
    assert not gathered.distances.any()


def test_the_press_scores_as_the_tuning_does(llama, chat_tokenizer, tmp_path):
    routers, _ = train(llama, chat_tokenizer, CONFIG, tmp_path)
    name, prompt = long_prompts(CONFIG, chat_tokenizer, max_tokens(llama))[0]
    assert prompt.context.shape[1] > routers.config.reach + 100
    shard = next((tmp_path / "long").glob(f"{name.replace('/', '-')}*"))
    settings = {"menu": menu_of("mixed", True), "top_k": 2, "learned": 0, "coded_share": 0.5, "train_gate": True}
    losses = {"aux_loss_weight": 0.0, "replay_weight": 0.0, "epochs": 1, "learning_rate": 0.1, "seed": 0}
    read = reader(CONFIG, CONFIG.heuristics)
    tuner = DecayTuning(llama, chat_tokenizer, routers, [TuningSample(prompt, shard)], read, **settings, **losses)
    with torch.no_grad():
        for layer in routers.layers:
            layer.calibration.decay += 3.0
        judged, _, _ = tuner.judge(read(shard))
    given = scores_of(llama, routers, prompt.context, top_k=2)
    assert (given - judged).abs().quantile(0.99) < 0.02  # shards have half precision


def test_only_decays_learn_from_long_prompts(llama, chat_tokenizer, tmp_path):
    plain, _ = train(llama, chat_tokenizer, replace(CONFIG, long_samples=0), tmp_path)
    routers, metrics = train(llama, chat_tokenizer, CONFIG, tmp_path)
    assert routers.config == replace(plain.config, reach=320)
    assert len(metrics["decay"]) == 3
    assert all(epoch["answer"] > 0 for epoch in metrics["decay"])
    before, after = dict(plain.named_parameters()), dict(routers.named_parameters())
    decays = {name for name in after if name.endswith("calibration.decay")}
    assert after.keys() - before.keys() == decays
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(bool(after[name].ne(0).all()) for name in decays)


def test_a_tuning_that_was_interrupted_goes_on(llama, chat_tokenizer, tmp_path, monkeypatch):
    whole, metrics = train(llama, chat_tokenizer, CONFIG, tmp_path / "whole")
    learn, learned = EndToEnd._learn, []

    def interrupted(self, *args):
        if len(learned) == CONFIG.samples + 4:  # in the second epoch of the decays
            raise KeyboardInterrupt
        learned.append(args)
        return learn(self, *args)

    monkeypatch.setattr(EndToEnd, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(llama, chat_tokenizer, CONFIG, tmp_path / "again")
    learned.clear()
    again, continued = train(llama, chat_tokenizer, CONFIG, tmp_path / "again")
    assert len(learned) == 6  # two epochs of three prompts
    assert continued == metrics
    assert weights_hash(again) == weights_hash(whole)


@pytest.mark.parametrize(
    ("limit", "lengths"),
    [(8192, [3072, 2560, 2048, 3072]), (4096, [3072, 2560, 2048, 3072]), (2560, [2048, 1706, 1365, 2048]), (2048, [])],
)
def test_long_prompts_fit_the_model(chat_tokenizer, limit, lengths):
    config = TrainingConfig(tasks=("copy",), long_samples=4)
    made = [name.split("/") for name, _ in long_prompts(config, chat_tokenizer, limit)]
    assert [int(length) for _, _, length, _ in made] == lengths
    assert all(split == "train" for _, split, _, _ in made)
    assert all(int(length) > config.reach(limit) for _, _, length, _ in made)
    assert config.reach(limit) == (1280 if lengths else 0)
    assert replace(config, end_to_end=0).reach(limit) == 0


def test_routers_without_decays_are_read_as_they_are_and_a_wrong_reach_is_refused(llama, tmp_path):
    routers = calibrated_routers(llama)
    save_routers(routers, tmp_path)
    loaded = load_routers(tmp_path)
    assert loaded.config.reach == 16
    assert weights_hash(loaded) == weights_hash(routers)
    card = (tmp_path / "routers.json").read_text()
    (tmp_path / "routers.json").write_text(card.replace('"reach": 16', '"reach": -1'))
    with pytest.raises(CheckpointError, match="reach: got -1"):
        load_routers(tmp_path)
    (tmp_path / "routers.json").write_text(card.replace(',\n  "reach": 16', ""))
    with pytest.raises(CheckpointError, match="describes another number"):
        load_routers(tmp_path)


def test_routers_of_before_have_no_reach(llama, tmp_path):
    routers = Routers(replace(calibrated_routers(llama).config, reach=0))
    save_routers(routers, tmp_path)
    card = json.loads((tmp_path / "routers.json").read_text())
    del card["config"]["reach"]
    (tmp_path / "routers.json").write_text(json.dumps(card))
    loaded = load_routers(tmp_path)
    assert loaded.config == routers.config
    assert loaded.layers[0].calibration.fading(torch.arange(5)[None]) is None


def test_another_number_of_long_prompts_does_not_repeat_the_tuning(llama, chat_tokenizer, tmp_path, monkeypatch):
    train(llama, chat_tokenizer, replace(CONFIG, long_samples=0), tmp_path)
    learn, learned = EndToEnd._learn, []
    monkeypatch.setattr(EndToEnd, "_learn", lambda self, *args: (learned.append(type(self)), learn(self, *args))[1])
    train(llama, chat_tokenizer, CONFIG, tmp_path)
    assert learned == [DecayTuning] * 9
