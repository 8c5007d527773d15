"""Far pairs score lower: by each head's decay, evenly from the reach on. Only decays learn from long prompts."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe import MoERouterPress
from kvpress_moe.errors import CheckpointError
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers.checkpoint import load_routers, save_routers, weights_hash
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.end_to_end import EndToEnd
from kvpress_moe.training.trainer import long_prompts, train
from tests.tiny import calibrated_routers, decoder, prefill, tokens

CONFIG = TrainingConfig(
    experts=("learned", "keydiff"),
    top_k=2,
    samples=2,
    study=0,
    length=256,
    tasks=("kv_list", "copy"),
    epochs=1,
    bottleneck=8,
    learned_width=8,
    end_to_end=1,
    long_samples=3,
)


def scores_of(model, routers, input_ids):
    """What the press gives each layer's pairs, (L, H, S)."""
    found = []

    class Noting(MoERouterPress):
        def mix(self, call, routing):
            found.append(super().mix(call, routing)[0])
            return found[-1][None]

    prefill(model, input_ids, Noting(router=routers, compression_ratio=0.5))
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
    chunk = call_of(llama, hidden[:, 2:6], keys[:, :, 2:6], hidden_states=hidden)
    assert chunk.distances.tolist() == [[7, 6, 5, 4]]
    decoding = call_of(llama, hidden[:, 8:], keys, position_ids=torch.tensor([[8, 9]]))
    assert decoding.distances.tolist() == [list(range(9, -1, -1))]


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
    [(8192, [3072, 2048, 2560, 1536]), (4096, [3072, 2048, 2560, 1536]), (2560, [2048, 1365, 1706, 1024]), (2048, [])],
)
def test_long_prompts_fit_the_model(chat_tokenizer, limit, lengths):
    config = TrainingConfig(tasks=("copy",), long_samples=4)
    made = [name.split("/") for name, _ in long_prompts(config, chat_tokenizer, limit)]
    assert [int(length) for _, _, length, _ in made] == lengths
    assert all(split == "train" for _, split, _, _ in made)
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
