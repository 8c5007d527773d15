"""Tuning end to end: the soft budget is the hard one at low temperature, and its gradient improves answers."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.cache_eval import evaluate_caches, evaluate_full_cache, read, stack
from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.prompts import Prompt, encode
from kvpress_moe.benchmark.selections import Kept, Selections
from kvpress_moe.benchmark.shared_prefill import select_pairs
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.budget.allocation import share
from kvpress_moe.codes.precision import menu_of
from kvpress_moe.errors import CheckpointError, NotFiniteError, UnsupportedModelError
from kvpress_moe.model.layers import full_attention_layers, language_model
from kvpress_moe.training import end_to_end
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.end_to_end import EndToEnd
from kvpress_moe.training.prompt_cache import as_cache, full_cache
from kvpress_moe.training.shards import Shards
from kvpress_moe.training.soft_budget import soft_share
from kvpress_moe.training.soft_eviction import softly_evicted
from kvpress_moe.training.trainer import made_prompts, train
from kvpress_moe.training.tuning_samples import REPEATED, TuningSample, question, reader, repetition
from tests.tiny import FAMILIES, tiny_model

CONFIG = TrainingConfig(
    long_samples=0,
    experts=("learned", "keydiff"),
    top_k=2,
    samples=4,
    study=0,
    length=300,
    tasks=("kv_list", "copy"),
    epochs=1,
    bottleneck=8,
    learned_width=8,
    end_to_end=1,
)


@pytest.fixture(scope="module")
def prompt(chat_tokenizer):
    return encode(make_sample("kv_list", len, 400, 0), chat_tokenizer)


def random_scores(seed, units=3, tokens=12):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(units, tokens, generator=generator)
    protected = torch.zeros(tokens, dtype=torch.bool)
    protected[:2] = True
    return scores, protected


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_kept=st.integers(3, 11),
    min_share=st.sampled_from([0.0, 0.2, 1.0]),
    temperature=st.sampled_from([1e-4, 0.3]),
)
def test_pairs_above_a_half_are_those_that_the_budget_keeps(seed, n_kept, min_share, temperature):
    scores, protected = random_scores(seed)
    kept = share(scores.masked_fill(protected, 1e30)[None], n_kept, max(1, int(n_kept * min_share)))[0]
    stays = soft_share(scores, protected, n_kept, min_share, temperature).exp()
    # a unit's own last pair, where the floor keeps it, and the best pair that goes stand on the threshold itself
    assert bool((stays[kept] >= 0.5).all())
    assert bool((stays[~kept] <= 0.5).all())
    if temperature < 0.01:
        assert int((stays - kept.float()).abs().gt(0.01).sum()) <= len(scores) + 1


def test_a_budget_is_shared_so_the_gradient_of_equal_gains_is_nothing():
    scores, protected = random_scores(0)
    scores.requires_grad_()
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    (soft_share(scores, protected, 5, 0.2, 0.5) * weights).sum().backward()
    assert scores.grad.abs().sum() > 1
    assert_close(scores.grad.sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(scores.grad[:, protected], torch.zeros(3, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_one_and_nothing_read_like_the_cache_that_is_left(family, prompt):
    model = tiny_model(family)
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=prompt.context, past_key_values=cache)
    n_read = prompt.context.shape[1]
    layers = full_attention_layers(model)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(cache.layers[i].keys.shape[1:3], generator=generator) < 0.4 for i in layers]
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    log_kept = torch.where(torch.stack(masks), 0.0, -torch.inf)
    with torch.no_grad():
        left = stack(Selections(cache, layers), [Kept(masks, None, n_read)])
        expected = read(model, left, prompt, n_read)
        with softly_evicted(model, layers, log_kept):
            got = read(model, as_cache(pairs), prompt, n_read)
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == n_read
    assert not any(layer.self_attn._forward_pre_hooks for layer in language_model(model).layers)


def test_tuning_brings_the_answers_nearer_to_those_of_the_full_cache(llama, chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "TEMPERATURES", (0.2, 0.2))  # so that epochs compare
    monkeypatch.setattr(end_to_end, "KEPT", (0.2, 0.2))
    config = replace(CONFIG, end_to_end=12, end_to_end_rate=1e-2, replay_weight=0.0)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    asked = [parameter.requires_grad for parameter in llama.parameters()]
    _, metrics = train(llama, chat_tokenizer, config, tmp_path)
    answers = [epoch["answer"] for epoch in metrics["end_to_end"]]
    assert len(answers) == 12
    assert min(answers[-3:]) < 0.7 * answers[0]
    assert all(epoch["replay"] == 0 for epoch in metrics["end_to_end"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert [parameter.requires_grad for parameter in llama.parameters()] == asked


def test_an_epoch_that_is_there_is_not_done_again(llama, chat_tokenizer, tmp_path, monkeypatch):
    whole, metrics = train(llama, chat_tokenizer, replace(CONFIG, end_to_end=2), tmp_path / "whole")
    halted = []
    learn, learned = EndToEnd._learn, []

    def interrupted(self, *args):
        if len(learned) == CONFIG.samples + 1:  # in the second epoch
            halted.append(self)
            raise KeyboardInterrupt
        learned.append(args)
        return learn(self, *args)

    monkeypatch.setattr(EndToEnd, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(llama, chat_tokenizer, replace(CONFIG, end_to_end=2), tmp_path / "again")
    learned.clear()
    routers, again = train(llama, chat_tokenizer, replace(CONFIG, end_to_end=2), tmp_path / "again")
    assert len(learned) == CONFIG.samples
    assert again == metrics
    for name, tensor in routers.state_dict().items():
        assert_close(tensor, whole.state_dict()[name], equal_nan=True, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in llama.parameters()), "a run that was interrupted left its mark"
    assert all(parameter.requires_grad for parameter in halted[0].routers.parameters())
    plain, _ = train(llama, chat_tokenizer, replace(CONFIG, end_to_end=0), tmp_path / "again")
    taken = halted[0].routers.state_dict()
    for name, tensor in plain.state_dict().items():  # taken along by five steps, not in another scaling
        assert_close(taken[name], tensor, equal_nan=True, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("change", [{"gate": False}, {"experts": ("keydiff",), "top_k": 1}, {"top_k": 1}])
def test_other_recipes_are_tuned_too(llama, chat_tokenizer, tmp_path, change):
    config = replace(CONFIG, **change)
    plain, _ = train(llama, chat_tokenizer, replace(config, end_to_end=0), tmp_path)
    tuned, metrics = train(llama, chat_tokenizer, config, tmp_path)
    assert len(metrics["end_to_end"]) == 1
    changed = {
        name.split(".", 2)[2]
        for name, tensor in plain.state_dict().items()
        if not torch.allclose(tensor, tuned.state_dict()[name], equal_nan=True, rtol=0, atol=1e-5)
    }
    assert "calibration.slope" in changed
    assert ("up.weight" in changed) == (config.gate and config.top_k > 1)  # one expert has all the weight


def test_what_is_repeated_is_a_part_of_the_context(chat_tokenizer, prompt):
    asked, n_logits = repetition(prompt, chat_tokenizer, random.Random(0))
    ids = prompt.context[0].tolist()
    part = asked[0, -n_logits + 1 :].tolist()
    places = [at for at in range(len(ids)) if ids[at : at + len(part)] == part]
    assert n_logits == REPEATED
    assert places
    before = chat_tokenizer.decode(ids[places[0] - 8 : places[0]])
    assert f"starting with `{before}`" in chat_tokenizer.decode(asked[0])
    short = Prompt(prompt.context[:, : prompt.n_prefix + 12], prompt.question, prompt.answer, prompt.n_prefix)
    for seed in range(20):
        asked, n_logits = repetition(short, chat_tokenizer, random.Random(seed))
        assert 1 <= n_logits <= 12


def test_the_question_predicts_every_token_of_the_answer(prompt):
    tokens, n_logits = question(prompt)
    assert n_logits == prompt.answer.shape[1]
    assert torch.equal(tokens[0, -n_logits + 1 :], prompt.answer[0, :-1])


@pytest.mark.parametrize("damaged", ["caches/*.safetensors", "fitted-*/epoch-0.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "another"])
def test_damaged_files_are_refused_by_name(llama, chat_tokenizer, tmp_path, damaged, damage):
    train(llama, chat_tokenizer, CONFIG, tmp_path)
    (victim, *_) = tmp_path.glob(damaged)
    another = next(tmp_path.glob("*.safetensors")).read_bytes()
    victim.write_bytes(victim.read_bytes()[:-100] if damage == "truncated" else another)
    for state in tmp_path.glob("fitted-*/epoch-*"):  # so that the caches are read again
        if state != victim:
            state.unlink()
    with pytest.raises(CheckpointError, match=f"shards: .*{victim.name} cannot be read"):
        train(llama, chat_tokenizer, CONFIG, tmp_path)


def test_the_gradient_is_that_of_a_threshold_which_holds_the_soft_budget():
    """Against finite differences: the threshold moves so that the sum of soft shares stays what it was."""
    scores, protected = (tensor.double() if tensor.is_floating_point() else tensor for tensor in random_scores(3))
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    temperature, n_kept, free = 0.5, 5, ~protected

    def threshold_at(moved, held):
        low, high = moved.min() - 20, moved.max() + 20
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if ((moved - middle) / temperature).sigmoid().sum() > held else (low, middle)
        return middle

    stays = soft_share(scores.float(), protected, n_kept, 0.0, temperature).double()
    thresholds = scores - temperature * (stays - torch.log1p(-stays.exp()))
    assert_close(thresholds[:, free], thresholds[0, free][:1].expand(3, int(free.sum())), atol=1e-4, rtol=0)
    held = stays[:, free].exp().sum()

    def loss(moved):
        shares = torch.nn.functional.logsigmoid((moved - threshold_at(moved, held)) / temperature)
        return (shares * weights[:, free]).sum()

    scored = scores.float().requires_grad_()
    (soft_share(scored, protected, n_kept, 0.0, temperature)[:, free] * weights[:, free]).sum().backward()
    inside, step = scores[:, free], 1e-5
    for unit, token in [(0, 0), (1, 4), (2, 9)]:
        nudge = torch.zeros_like(inside)
        nudge[unit, token] = step
        slope = (loss(inside + nudge) - loss(inside - nudge)) / (2 * step)
        assert_close(scored.grad[:, free][unit, token].double(), slope, rtol=1e-3, atol=1e-3)


def test_without_steps_the_routers_are_those_that_were_fitted(llama, chat_tokenizer, tmp_path):
    plain, _ = train(llama, chat_tokenizer, replace(CONFIG, end_to_end=0), tmp_path)
    tuned, _ = train(llama, chat_tokenizer, replace(CONFIG, end_to_end_rate=0.0), tmp_path)
    for name, tensor in plain.state_dict().items():
        assert_close(tuned.state_dict()[name], tensor, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_what_is_repeated_teaches_too(llama, chat_tokenizer, tmp_path):
    without, _ = train(llama, chat_tokenizer, replace(CONFIG, replay_weight=0.0), tmp_path)
    with_it, _ = train(llama, chat_tokenizer, replace(CONFIG, replay_weight=5.0), tmp_path)
    assert not torch.equal(without.layers[0].calibration.slope, with_it.layers[0].calibration.slope)


def test_layers_that_slide_are_left_alone(chat_tokenizer, tmp_path):
    model = tiny_model("gemma3")
    plain, _ = train(model, chat_tokenizer, replace(CONFIG, end_to_end=0), tmp_path)
    tuned, _ = train(model, chat_tokenizer, CONFIG, tmp_path)
    changed = {
        layer_idx
        for layer_idx, (one, other) in enumerate(zip(plain.layers, tuned.layers, strict=True))
        if not torch.equal(one.calibration.slope, other.calibration.slope)
    }
    assert changed == set(full_attention_layers(model))
    assert len(changed) < len(tuned.layers)


def test_a_loss_that_is_not_finite_is_an_error_and_nothing_is_kept(llama, chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(EndToEnd, "divergence", lambda *args: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(NotFiniteError, match="^loss: got nan for kv_list-train"):
        train(llama, chat_tokenizer, CONFIG, tmp_path)
    assert not list(tmp_path.glob("fitted-*/epoch-*"))


def test_attention_without_additive_masks_is_refused_before_anything_is_read(llama, chat_tokenizer, tmp_path):
    attention = llama.config._attn_implementation
    llama.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(UnsupportedModelError, match="^model: got attn_implementation='flash_attention_2'"):
            train(llama, chat_tokenizer, CONFIG, tmp_path)
    finally:
        llama.config._attn_implementation = attention
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_at_low_temperature_the_soft_choice_is_what_the_benchmark_judges(family, share, chat_tokenizer, tmp_path):
    """The press's strategies, the KL of its packed cache, and the soft ones of training are the same."""
    model = tiny_model(family)
    config = replace(CONFIG, end_to_end_rate=1e-2, coded_share=1.0)
    routers, _ = train(model, chat_tokenizer, config, tmp_path)
    shards, made = Shards(tmp_path), made_prompts(model, chat_tokenizer, config, tmp_path)
    menu = menu_of("mixed", transformed=True)
    settings = {"top_k": 2, "learned": 0, "menu": menu, "coded_share": 1.0, "train_gate": True, "aux_loss_weight": 0.0}
    settings |= {"replay_weight": 0.0, "epochs": 1, "learning_rate": 0.0, "seed": 0}
    samples = [TuningSample(prompt, shards.path(name)) for name, prompt in made]
    tuner = EndToEnd(model, chat_tokenizer, routers, samples, reader(config, ["keydiff"]), **settings)
    sample = samples[0]
    press = MoERouterPress(router=routers, precision="mixed", cache_aware=False)
    method = Method("own", "ours", lambda protect: press, "global", "own", precision="own")
    selections = select_pairs(model, sample.prompt.context, {"own": method}, [("own", 1 - share)], 4, 16)
    kept = selections.kept["own", 1 - share]
    reference = evaluate_full_cache(model, selections.cache, sample.prompt)
    (answer,) = evaluate_caches(model, selections, sample.prompt, reference, [kept])
    with torch.no_grad(), tuner._scaled():
        cache = full_cache(model, sample.prompt.context, sample.cache_path)
        scores, worths, _ = tuner.judge(tuner.read(sample.shard))
        pairs, log_kept, balance = tuner.code_softly(cache, scores, worths, tuner.read(sample.shard).power, share, 1e-3)
        divergence = tuner.divergence(cache, pairs, *question(sample.prompt), log_kept)
    hard = torch.stack([layer > 0 for layer in kept.coded.strategies])
    assert ((log_kept.exp() > 0.5) == hard).float().mean() > 0.98  # shards are in half precision
    assert 1 / len(menu) / 2 < float(balance) <= 1
    assert float(divergence) == pytest.approx(answer.kl, rel=0.3, abs=1e-5)
