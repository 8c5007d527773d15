"""The shared prefill is exact: every method keeps and answers what its hooked press would have."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.cache_eval import batches, evaluate_caches, evaluate_full_cache, hit_rate, stack
from kvpress_moe.benchmark.hooked_baseline import answer_hooked
from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.benchmark.methods import find_methods, touches_windows
from kvpress_moe.benchmark.multi_pass import select_in_own_prefill
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.selections import Kept
from kvpress_moe.benchmark.shared_prefill import allocate, select_pairs
from kvpress_moe.budget.allocation import share
from kvpress_moe.cache import RaggedCache
from kvpress_moe.model.layers import full_attentions, language_model, of_layer
from tests.tiny import FAMILIES, decoder, kept_positions, prefill, tiny_model, tokens

RATIOS = (0.5, 0.8)
METHODS = find_methods(None) | find_methods(["observed_attention", "kvcompose"])
HOOKED = [
    name
    for name, method in METHODS.items()
    if name != "full" and method.budget in (None, "uniform") and method.scorer != "kvzip"
]


@pytest.fixture(scope="module")
def prompt():
    ids = tokens(330)
    return Prompt(ids[:, :300], ids[:, 300:318], ids[:, 318:])


@pytest.fixture(scope="module")
def selections(llama, prompt):
    cells = [(name, ratio) for name in HOOKED for ratio in RATIOS]
    found = select_pairs(llama, prompt.context, METHODS, cells, sinks=4, recent=8)
    select_in_own_prefill(llama, None, prompt, found, METHODS, cells, sinks=4, recent=8)
    return found


@pytest.mark.parametrize("name", HOOKED)
def test_every_method_keeps_and_answers_what_its_hooked_press_does(llama, prompt, selections, name):
    reference = evaluate_full_cache(llama, selections.cache, prompt)
    for ratio in RATIOS:
        kept = selections.kept[name, ratio]
        hooked, cache = answer_hooked(llama, prompt, METHODS[name], ratio, sinks=4, recent=8)
        answer = evaluate_caches(llama, selections, prompt, reference, [kept])[0]
        nll = torch.nn.functional.cross_entropy(hooked, prompt.answer[0])
        assert_close(torch.tensor(answer.nll), nll.detach(), atol=2e-4, rtol=1e-4)
        if name in ("kvcompose", "observed_attention") or not kept.mask:
            continue
        if not isinstance(cache, RaggedCache):
            cache.crop(-(prompt.question.shape[1] + prompt.answer.shape[1] - 1))
            for positions, mask in zip(kept_positions(selections.cache, cache), kept.mask, strict=True):
                assert torch.equal(torch.zeros_like(mask).scatter_(1, positions[0], True), mask)


SLIDING = [name for name in HOOKED if touches_windows(METHODS[name]) is None]


@pytest.fixture(scope="module", params=[family for family in ("gemma2", "gemma3_text", "gemma3") if family in FAMILIES])
def gemma(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def judged_gemma(gemma, prompt):
    cells = [(name, 0.5) for name in SLIDING]
    return select_pairs(gemma, prompt.context, METHODS, cells, sinks=4, recent=8)


@pytest.mark.parametrize("name", SLIDING)
def test_layers_that_slide_are_left_alone_by_all(gemma, prompt, judged_gemma, name):
    """Of three layers with a window in the first, whose 16 tokens the question of 18 leaves behind."""
    kept = judged_gemma.kept[name, 0.5]
    hooked, cache = answer_hooked(gemma, prompt, METHODS[name], 0.5, sinks=4, recent=8)
    answer = evaluate_caches(
        gemma, judged_gemma, prompt, evaluate_full_cache(gemma, judged_gemma.cache, prompt), [kept]
    )[0]
    nll = torch.nn.functional.cross_entropy(hooked, prompt.answer[0])
    assert_close(torch.tensor(answer.nll), nll.detach(), atol=2e-4, rtol=1e-4)
    assert len(kept.altered or kept.mask) == 2
    assert cache.layers[0].keys.shape[2] == 300 + 18 + 12 - 1


def test_caches_of_a_model_with_windows_are_asked_together_as_alone(gemma, prompt, judged_gemma):
    """All in one batch, in two by their bytes, and one that keeps everything; 16 written tokens leave the window."""
    reference = evaluate_full_cache(gemma, judged_gemma.cache, prompt)
    everything = Kept([torch.ones(2, 300, dtype=torch.bool)] * 2, None, 300)
    kept = [everything, *(judged_gemma.kept[name, 0.5] for name in SLIDING[:6])]
    together = evaluate_caches(gemma, judged_gemma, prompt, reference, kept, write=16)
    assert together[0].kl < 1e-6
    assert together[0].n_pairs == 2 * 2 * 300
    for one, answer in zip(kept, together, strict=True):
        alone = evaluate_caches(gemma, judged_gemma, prompt, reference, [one], write=16)[0]
        assert abs(alone.nll - answer.nll) < 1e-4
        assert alone.written == answer.written


def test_presses_are_given_the_rotation_of_the_layer_that_they_judge(gemma):
    attention = full_attentions(gemma)[0]
    rotary = language_model(gemma).rotary_emb
    states, positions = torch.zeros(1, 5, 16), torch.arange(5)[None]
    expected = (
        rotary(states, positions)
        if gemma.config.model_type == "gemma2"
        else rotary(states, positions, "full_attention")
    )
    assert_close(of_layer(rotary, attention)(states, positions), expected)


def test_kvzip_of_a_model_with_windows_judges_the_other_layers(gemma, prompt, tokenizer):
    method = find_methods(["kvzip_global"])
    found = select_pairs(gemma, prompt.context, method, [("kvzip_global", 0.7)], sinks=4, recent=8)
    select_in_own_prefill(gemma, tokenizer, prompt, found, method, [("kvzip_global", 0.7)], sinks=4, recent=8)
    masks = found.kept["kvzip_global", 0.7].mask
    assert sum(int(mask.sum()) for mask in masks) == 2 * 2 * 90
    assert masks[0].sum(-1).tolist() != [90, 90]


def test_kvzip_judges_the_beginning_of_the_chat_template_like_the_mean_token(llama, prompt, monkeypatch):
    """KVzip never repeats it, so its own score of 0 says nothing."""
    n_tokens, n_prefix = prompt.context.shape[1], 12
    given = torch.rand(2, 2, n_tokens)
    given[..., :n_prefix] = 0
    monkeypatch.setattr(ReplayScores, "of", lambda *_: given.clone())
    method = find_methods(["kvzip_uniform"])
    cells = [("kvzip_uniform", 0.4), ("kvzip_uniform", 0.8)]
    found = select_pairs(llama, prompt.context, method, cells, sinks=0, recent=0)
    with_prefix = replace(prompt, n_prefix=n_prefix)
    select_in_own_prefill(llama, None, with_prefix, found, method, cells, sinks=0, recent=0)
    for cell, are_kept in zip(cells, (True, False), strict=True):
        for mask in found.kept[cell].mask:
            assert (mask[:, :n_prefix] == are_kept).all()


@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("expert", ["expected_attention", "keydiff"])
def test_shared_budgets_keep_what_the_press_keeps(prompt, budget, expert):
    model = tiny_model("llama")
    method = find_methods([f"{expert}_{budget}"])
    found = select_pairs(model, prompt.context, method, [(f"{expert}_{budget}", 0.7)], sinks=0, recent=0)
    press = MoERouterPress(0.7, experts=[expert], budget=budget)
    cache = prefill(model, prompt.context, press)
    kept = found.kept[f"{expert}_{budget}", 0.7]
    for mask, layer in zip(kept.mask, cache.layers, strict=True):
        assert mask.sum(-1).tolist() == layer.lengths[0]
    ragged = stack(found, [kept])
    for ours, theirs in zip(ragged.layers, cache.layers, strict=True):
        assert torch.equal(ours.flat_keys, theirs.flat_keys)


def test_judging_leaves_the_prefill_and_the_model_as_they_were(llama, prompt, selections):
    fresh = DynamicCache()
    with torch.no_grad():
        llama.model(input_ids=prompt.context, past_key_values=fresh)
    for ours, theirs in zip(selections.cache.layers, fresh.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    for layer in decoder(llama).layers:
        assert not layer.self_attn._forward_hooks
        assert getattr(layer.self_attn, "masked_key_indices", None) is None
        assert not hasattr(layer.self_attn, "rotary_emb")


def test_asking_many_caches_at_once_answers_as_asking_one_by_one(llama, prompt, selections):
    reference = evaluate_full_cache(llama, selections.cache, prompt)
    kept = [selections.kept[cell] for cell in list(selections.kept)[:12]]
    together = evaluate_caches(llama, selections, prompt, reference, kept, write=16)
    for one, answer in zip(kept, together, strict=True):
        alone = evaluate_caches(llama, selections, prompt, reference, [one], write=16)[0]
        assert abs(alone.nll - answer.nll) < 1e-4
        assert alone.written == answer.written


def test_what_is_written_is_greedy_decoding(llama, prompt, selections):
    reference = evaluate_full_cache(llama, selections.cache, prompt)
    kept = selections.kept["keydiff", 0.5]
    answer = evaluate_caches(llama, selections, prompt, reference, [kept], write=9)[0]
    cache = stack(selections, [kept])
    ids, position, written = prompt.question, prompt.context.shape[1], []
    for _ in range(9):
        positions = torch.arange(position, position + ids.shape[1])
        with torch.no_grad():
            logits = llama(
                input_ids=ids, past_key_values=cache, cache_position=positions, position_ids=positions[None]
            ).logits
        position += ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        written.append(ids.item())
    assert answer.written == written


def test_the_full_cache_has_no_divergence_and_misses_nothing(llama, prompt, selections):
    reference = evaluate_full_cache(llama, selections.cache, prompt)
    everything = Kept([torch.ones(2, 300, dtype=torch.bool)] * 2, None, 300)
    answer = evaluate_caches(llama, selections, prompt, reference, [everything])[0]
    assert answer.kl < 1e-6
    assert answer.hit_rate == pytest.approx(1)
    assert answer.n_pairs == 2 * 2 * 300
    assert answer.n_bytes == answer.n_pairs * 2 * 8 * 2  # as in a 16-bit cache


def test_hit_rate_is_the_share_of_the_mass_on_kept_pairs():
    mass = torch.rand(2, 3, 10)
    masks = [torch.rand(3, 10) > 0.5 for _ in range(2)]
    expected = sum(
        mass[layer, head, pair].item()
        for layer in range(2)
        for head in range(3)
        for pair in range(10)
        if masks[layer][head, pair]
    )
    assert hit_rate(Kept(masks), mass) == pytest.approx(expected / mass.sum().item(), rel=1e-5)


@pytest.mark.parametrize("budget", ["uniform", "layer", "global"])
def test_every_budget_keeps_exactly_as_many_pairs(budget):
    scores = [torch.randn(3, 101) for _ in range(4)]
    masks = allocate(scores, 0.7, budget, 0.2)
    n_kept = 30  # int(101 * 0.3)
    assert sum(int(mask.sum()) for mask in masks) == 4 * 3 * n_kept
    if budget == "layer":
        expected = share(scores[2][None], n_kept, 12)[0]  # twice a fifth of 30
        assert torch.equal(masks[2], expected)


def test_protection_is_the_same_for_all(selections):
    for (name, ratio), kept in selections.kept.items():
        if not kept.mask or METHODS[name].own_prefill or name.startswith(("chunk", "block", "entropy")):
            continue
        for mask in kept.mask:
            assert mask[:, :4].all(), (name, ratio)
            assert mask[:, -8:].all(), (name, ratio)


def test_batches_hold_at_most_the_bytes_asked_for():
    kept = [Kept([torch.ones(1, n, dtype=torch.bool)]) for n in (5, 5, 20, 1, 1, 1)]
    assert list(batches(kept, bytes_per_pair=2, limit=20)) == [[0, 1], [2], [3, 4, 5]]
    assert list(batches(kept, bytes_per_pair=2, bytes_beside=7, limit=20)) == [[0], [1], [2], [3, 4], [5]]
