"""Heads of different lengths: exact budgets, the logits of masked dense attention, and memory that is really freed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import AdaKVPress, DMSPress, ExpectedAttentionPress, KnormPress
from kvpress.pipeline import KVPressTextGenerationPipeline
from kvpress.utils import compute_n_kept
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from kvpress_moe import MoERouterPress, SettingError, UnsupportedInputError
from kvpress_moe.budget.allocation import least_pairs, share
from kvpress_moe.cache import RaggedCache, RaggedLayer, torch_backend
from kvpress_moe.cache.prefill import Prefill, cache_bytes
from tests.tiny import decoder, nothing, positions_of, prefill, tiny_model, tokens

PROMPT = 90
FULL_ATTENTION = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


@pytest.fixture(scope="module")
def llama():
    """A model of this module's own: kvpress's wrappers leave their traces on it."""
    return tiny_model("llama")


def shared(budget, **settings):
    return MoERouterPress(experts=["expected_attention"], budget=budget, **settings)


def ragged_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]


def n_pairs(cache):
    return sum(length for layer in ragged_layers(cache) for heads in layer.lengths for length in heads)


@pytest.mark.parametrize("logits_at_once", [2**19, 1])
@pytest.mark.parametrize("n_new", [1, 4])
def test_logits_are_bent_as_the_layer_bends_them(monkeypatch, n_new, logits_at_once):
    """Gemma 2's soft cap."""
    monkeypatch.setattr(torch_backend, "LOGITS_AT_ONCE", logits_at_once)
    keys, values, kept = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8), torch.rand(2, 3, 20) > 0.5
    new_keys, new_values, query = torch.randn(2, 3, n_new, 8), torch.randn(2, 3, n_new, 8), torch.randn(2, 6, n_new, 8)
    layer = RaggedLayer.from_dense(keys, values, kept)
    layer.update(new_keys, new_values)
    got = torch_backend.torch_attention(query, layer, 1.0, cap=1.5)

    seen = torch.cat((kept[:, :, None].expand(-1, -1, n_new, -1), torch.ones(2, 3, n_new, n_new).tril().bool()), dim=-1)
    keys, values = torch.cat((keys, new_keys), dim=2), torch.cat((values, new_values), dim=2)
    logits = 1.5 * torch.tanh(query @ repeat_kv(keys, 2).mT / 1.5)
    weights = logits.masked_fill(~seen.repeat_interleave(2, dim=1), -torch.inf).softmax(-1)
    assert_close(got, (weights @ repeat_kv(values, 2)).transpose(1, 2))


# ── the budget ───────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.floats(0, 0.99), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_units_share_exactly_the_promised_number_each_with_its_floor(length, n_units, ratio, min_share, ties, seed):
    scores = torch.randn(2, n_units, length, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores  # of equal scores those of the first unit, then the first ones, stay
    n_kept = compute_n_kept(length, ratio)
    floor = least_pairs(n_kept, min_share)
    kept = share(scores, n_kept, floor)
    assert kept.sum((1, 2)).tolist() == [n_units * n_kept] * 2
    assert (kept.sum(-1) >= floor).all()
    for row in range(2):  # a naive loop: everybody's floor first, then the best of what is left
        pairs = [(row, unit, s) for unit in range(n_units) for s in range(length)]
        safe = {
            pair
            for unit in range(n_units)
            for pair in sorted((p for p in pairs if p[1] == unit), key=lambda p: -scores[p].item())[:floor]
        }
        rest = sorted((pair for pair in pairs if pair not in safe), key=lambda p: -scores[p].item())
        expected = safe | set(rest[: n_units * n_kept - len(safe)])
        assert {pair for pair in pairs if kept[pair]} == expected


@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (90, 1), (500, 3)])
def test_kept_pairs_sum_to_the_promised_number(llama, budget, ratio, length, batch):
    cache = prefill(llama, tokens(length, batch), shared(budget, compression_ratio=ratio))
    n_kept = compute_n_kept(length, ratio)
    assert n_pairs(cache) == 2 * 2 * batch * n_kept
    for layer in ragged_layers(cache):
        assert layer.flat_keys.shape == layer.flat_values.shape == (sum(map(sum, layer.lengths)), 8)
        if budget == "layer":
            assert [sum(heads) for heads in layer.lengths] == [2 * n_kept] * batch


def test_pairs_move_between_layers_only_where_all_layers_share(llama):
    by_budget = {
        b: [sum(layer.lengths[0]) for layer in prefill(llama, tokens(PROMPT), shared(b)).layers]
        for b in ("layer", "global")
    }
    assert by_budget["layer"] == [PROMPT, PROMPT]
    assert by_budget["global"] != [PROMPT, PROMPT]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_a_layers_budget_keeps_what_adakv_keeps_and_frees_what_adakv_masks(llama, ratio):
    ours = prefill(llama, tokens(PROMPT), shared("layer", compression_ratio=ratio))
    masked = prefill(llama, tokens(PROMPT), AdaKVPress(ExpectedAttentionPress(ratio)))
    theirs = RaggedCache.from_masked(llama, masked)
    for mine, adakv in zip(ours.layers, theirs.layers, strict=True):
        assert mine.lengths == adakv.lengths
        assert torch.equal(mine.flat_keys, adakv.flat_keys)
    assert cache_bytes(masked) == cache_bytes(prefill(llama, tokens(PROMPT)))
    assert cache_bytes(ours) / cache_bytes(masked) == compute_n_kept(PROMPT, ratio) / PROMPT


def test_kept_pairs_stay_in_their_original_order(llama):
    full = prefill(llama, tokens(PROMPT))
    for layer, dense in zip(prefill(llama, tokens(PROMPT), shared("global")).layers, full.layers, strict=True):
        for head, (keys, _) in enumerate(layer.heads()[0]):
            positions = positions_of(keys[None, None], dense.keys[:, head : head + 1])[0, 0]
            assert (positions.diff() > 0).all()


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def masked_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Dense attention over all pairs, with minus infinity where ``module.kept`` says that a prompt's pair is gone."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    logits = query @ key.transpose(2, 3) * scaling
    q_len, k_len = logits.shape[2:]
    visible = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len).expand_as(logits).clone()
    if getattr(module, "kept", None) is not None:
        visible[..., : module.kept.shape[-1]] &= module.kept.repeat_interleave(module.num_key_value_groups, 1)[
            :, :, None
        ]
    elif getattr(module, "sliding_window", None):
        visible &= torch.ones(q_len, k_len, dtype=torch.bool).triu(k_len - q_len - module.sliding_window + 1)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS["masked_reference"] = masked_attention


@pytest.mark.parametrize("steps", [[1], [1, 1, 1], [5], [5, 1, 3]], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", [*FULL_ATTENTION, "gemma3_text"])
def test_logits_are_those_of_masked_dense_attention(family, batch, steps):
    model, reference = tiny_model(family), tiny_model(family)
    reference.config._attn_implementation = "masked_reference"
    ids, full = tokens(PROMPT, batch), DynamicCache()
    ragged = prefill(model, ids, shared("global"))
    with torch.no_grad():
        reference(ids, past_key_values=full)
    for index, layer in enumerate(ragged.layers):
        if isinstance(layer, RaggedLayer):
            kept = torch.zeros(full.layers[index].keys.shape[:3], dtype=torch.bool)
            for row, heads in enumerate(layer.heads()):
                for head, (keys, _) in enumerate(heads):
                    dense = full.layers[index].keys[row, head]
                    kept[row, head] = (dense[:, None] - keys).abs().amax(-1).amin(1) < 1e-4
            assert kept.sum(-1).tolist() == layer.lengths
            decoder(reference).layers[index].self_attn.kept = kept
    read = PROMPT
    for seed, n_new in enumerate(steps):
        new, positions = tokens(n_new, batch, seed=seed + 1), torch.arange(read, read + n_new)[None]
        with torch.no_grad():
            got = model(new, past_key_values=ragged, position_ids=positions).logits
            expected = reference(new, past_key_values=full, position_ids=positions).logits
        assert_close(got, expected, atol=1e-5, rtol=1e-5)
        read += n_new
    assert ragged.get_seq_length(1) == read


def test_positions_go_on_by_themselves(llama):
    """A ragged layer counts the tokens read, so that a bare forward pass needs no position_ids."""
    first, second = (prefill(llama, tokens(PROMPT), shared("global")) for _ in range(2))
    with torch.no_grad():
        plain = llama(tokens(3, seed=1), past_key_values=first).logits
        told = llama(tokens(3, seed=1), past_key_values=second, position_ids=torch.arange(PROMPT, PROMPT + 3)[None])
    assert torch.equal(plain, told.logits)


def test_all_pairs_kept_is_the_full_cache(llama):
    full = prefill(llama, tokens(PROMPT))
    ragged = RaggedCache.from_dynamic(full)
    with torch.no_grad():
        assert_close(
            llama(tokens(4, seed=1), past_key_values=ragged).logits,
            llama(tokens(4, seed=1), past_key_values=full).logits,
        )


# ── life of a cache ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_inside_and_after_the_with_block_agree(llama, budget, how):
    ids, n_new = tokens(PROMPT), 6
    with shared(budget)(llama):
        inside = llama.generate(ids, max_new_tokens=n_new, **how)
    cache = DynamicCache()
    if "num_beams" not in how:
        with torch.no_grad(), shared(budget)(llama):
            first = llama(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        after = [first]
        for _ in range(n_new - 1):
            with torch.no_grad():
                after.append(llama(after[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        assert torch.equal(inside[:, PROMPT:], torch.cat(after, dim=1))
    assert inside.shape == (1, PROMPT + n_new)


def test_several_questions_in_the_pipeline_are_answered_as_alone(llama, tokenizer):
    ask = KVPressTextGenerationPipeline(model=llama, tokenizer=tokenizer)
    context, questions = "The crane lifts twelve tons. " * 5, ["What?", "How many tons?", "Why?"]
    for budget in ("layer", "global"):
        press = shared(budget, cache_aware=False)
        together = ask(context, questions=questions, press=press, max_new_tokens=5)["answers"]
        assert together == [ask(context, question=q, press=press, max_new_tokens=5)["answer"] for q in questions]


def test_crop_forgets_what_came_after_the_prompt_and_not_the_prompt(llama):
    cache = prefill(llama, tokens(PROMPT), shared("global"))
    with torch.no_grad():
        once = llama(tokens(5, seed=1), past_key_values=cache).logits
        cache.crop(PROMPT)
        again = llama(tokens(5, seed=1), past_key_values=cache).logits
    assert torch.equal(once, again)
    cache.crop(-5)
    assert cache.get_seq_length() == PROMPT
    with pytest.raises(UnsupportedInputError, match=f"at least the {PROMPT} tokens"):
        cache.crop(PROMPT - 1)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ],
)
def test_rows_of_a_batch_can_be_rearranged(llama, change, rows):
    ids, new = tokens(PROMPT, 3), tokens(2, 3, seed=1)
    cache = prefill(llama, ids, shared("layer"))
    with torch.no_grad():
        llama(new, past_key_values=cache)
        expected = llama(new, past_key_values=cache).logits[rows]
        cache.crop(PROMPT + 2)
        change(cache)
        assert_close(llama(new[rows], past_key_values=cache).logits, expected)


def test_what_a_kvpress_press_masked_is_freed_and_answers_alike(llama):
    """DMSPress masks by a threshold: not even the total per layer is even."""
    for press in (AdaKVPress(KnormPress(0.5)), DMSPress(KnormPress(), threshold=-4.0, sliding_window_size=8)):
        masked = prefill(llama, tokens(PROMPT), press)
        n_masked = [len(layer.self_attn.masked_key_indices[0]) for layer in llama.model.layers]
        assert sum(n_masked) > 0
        ragged = RaggedCache.from_masked(llama, masked)
        assert n_pairs(ragged) == 2 * 2 * PROMPT - sum(n_masked)
        assert all(layer.self_attn.masked_key_indices is None for layer in llama.model.layers)
        again = prefill(llama, tokens(PROMPT), press)
        positions = torch.tensor([[PROMPT]])
        with torch.no_grad():
            expected = llama(tokens(1, seed=1), past_key_values=again, position_ids=positions).logits
            for layer in llama.model.layers:
                layer.self_attn.masked_key_indices = None
            got = llama(tokens(1, seed=1), past_key_values=ragged, position_ids=positions).logits
        assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_was_masked_in_a_model_with_windows_is_freed_where_attention_is_full():
    """kvpress masks in layers that slide too; there all pairs stay, and the window still holds."""
    model, press = tiny_model("gemma3_text"), AdaKVPress(KnormPress(0.5))
    ragged = RaggedCache.from_masked(model, prefill(model, tokens(PROMPT), press))
    reference = prefill(model, tokens(PROMPT), press)
    attentions = [layer.self_attn for layer in model.model.layers]
    attentions[0].masked_key_indices = None
    kept = RaggedCache.from_masked(model, reference)
    assert [isinstance(layer, RaggedLayer) for layer in ragged.layers] == [False, True, True]
    full = DynamicCache()
    length = reference.layers[0].keys.shape[2]
    hidden = {}
    with torch.no_grad():
        model(tokens(PROMPT), past_key_values=full)
        for cache in (ragged, kept, full):
            hook = attentions[0].register_forward_hook(lambda *a, cache=cache: hidden.update({id(cache): a[-1][0]}))
            model(tokens(1, seed=1), past_key_values=cache, position_ids=torch.tensor([[PROMPT]]))
            hook.remove()
    assert_close(hidden[id(ragged)], hidden[id(full)])
    assert_close(hidden[id(kept)], hidden[id(full)])
    assert reference.layers[0].keys.shape[2] == length  # copied, not shared


def test_dense_to_ragged_and_back(llama):
    full = prefill(llama, tokens(PROMPT))
    back = RaggedCache.from_dynamic(full).to_dynamic()
    for layer, before in zip(back.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, before.keys)
        assert torch.equal(layer.values, before.values)
    with pytest.raises(UnsupportedInputError, match="expected equal lengths"):
        RaggedCache.from_kept(
            full, lambda i: torch.ones(1, 2, PROMPT, dtype=torch.bool).tril(-1) | torch.eye(2, PROMPT, dtype=torch.bool)
        ).to_dynamic()


def test_a_recorded_prefill_gives_the_hooked_press_cache_and_stays_whole(llama):
    recorded = Prefill(llama, tokens(PROMPT))
    for budget in ("layer", "global"):
        hooked = prefill(llama, tokens(PROMPT), shared(budget))
        for ours, theirs in zip(recorded.compress(shared(budget)).layers, hooked.layers, strict=True):
            assert torch.equal(ours.flat_keys, theirs.flat_keys)
    assert {type(layer).__name__ for layer in recorded.cache.layers} == {"DynamicLayer"}


def test_statistics_are_counted_with_shared_budgets_too(llama):
    press = shared("global")
    prefill(llama, tokens(PROMPT), press)
    kept = [
        1 - layer["expert_compression_stats"]["compression_ratios"][0]
        for layer in press.get_stats()["layer_stats"].values()
    ]
    assert sum(kept) / 2 == pytest.approx(0.5)
    assert kept[0] != kept[1]


def test_a_prompt_that_was_never_read_to_its_end_leaves_nothing_for_the_next(llama):
    press = shared("global")

    def stop(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prefill(llama, tokens(50), press)
    hook.remove()
    assert n_pairs(prefill(llama, tokens(PROMPT), press)) == 2 * PROMPT


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_eager_attention_is_refused():
    with pytest.raises(SettingError, match=r"budget: got 'global'.*eager"):
        prefill(tiny_model("llama", attn_implementation="eager"), tokens(9), shared("global"))


def test_attention_that_does_not_know_ragged_layers_fails_loudly(llama):
    cache = prefill(llama, tokens(PROMPT), shared("global"))
    eager = tiny_model("llama", attn_implementation="eager")
    with torch.no_grad(), pytest.raises(UnsupportedInputError, match=r"set_attn_implementation\('sdpa'\)"):
        eager(tokens(1), past_key_values=cache)


def test_wrappers_that_store_the_result_themselves_are_refused(llama):
    from kvpress import ComposedPress

    with pytest.raises(SettingError, match="inside a kvpress wrapper"):
        prefill(llama, tokens(PROMPT), ComposedPress([shared("layer")]))


@pytest.mark.parametrize(
    ("field", "value"), [("budget", "head"), ("budget", 1), ("min_share", 1.5), ("min_share", "a")]
)
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(SettingError, match=f"^{field}: got"):
        MoERouterPress(**{field: value})


def test_tracking_misses_is_refused_with_shared_budgets():
    with pytest.raises(SettingError, match="track_misses"):
        MoERouterPress(budget="layer", track_misses=True)
    press = MoERouterPress(track_misses=True)
    with pytest.raises(SettingError, match="track_misses"):
        press.budget = "global"


def test_keys_of_a_ragged_layer_are_no_tensor(llama):
    layer = prefill(llama, tokens(PROMPT), shared("layer")).layers[0]
    with pytest.raises(TypeError, match="heads of different lengths"):
        layer.keys = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TypeError, match="end only"):
        layer.keys[:, :, 3:]
    with nothing():
        layer.keys = layer.keys[:, :, :PROMPT]
    assert layer.get_seq_length() == PROMPT


def test_gradients_flow_through_ragged_attention(llama):
    """Nobody has to say no_grad; and what is written in place never meets a graph."""
    press = MoERouterPress(0.5, experts=["expected_attention"], budget="global")
    positions = torch.arange(60, 63)[None]
    graph = llama(tokens(3), past_key_values=prefill(llama, tokens(60), press), position_ids=positions).logits
    assert graph.requires_grad
    with torch.no_grad():
        plain = llama(tokens(3), past_key_values=prefill(llama, tokens(60), press), position_ids=positions).logits
    assert_close(graph, plain, rtol=1e-5, atol=1e-5)
    weight = decoder(llama).layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(graph.square().sum(), weight)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("what", ["query", "new_keys", "new_values", "flat_keys", "flat_values"])
def test_a_gradient_for_any_of_the_tensors_is_that_of_dense_attention(what):
    """Fine-tuning the value projection alone leaves queries and keys without one."""
    keys, values, query = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 4, 2, 8)
    new_keys, new_values = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    layer = RaggedLayer.from_dense(keys, values, torch.ones(1, 2, 5, dtype=torch.bool))
    layer.update(new_keys, new_values)
    leaf = (query if what == "query" else getattr(layer, what)).requires_grad_()
    got = torch_backend.torch_attention(query, layer, 0.3)

    all_keys = torch.cat((layer.flat_keys.view(1, 2, 5, 8), layer.new_keys), dim=2)
    all_values = torch.cat((layer.flat_values.view(1, 2, 5, 8), layer.new_values), dim=2)
    logits = query @ repeat_kv(all_keys, 2).mT * 0.3
    logits = logits.masked_fill(torch.ones(2, 7, dtype=torch.bool).triu(6), -torch.inf)
    expected = (logits.softmax(-1) @ repeat_kv(all_values, 2)).transpose(1, 2)
    (gradient,) = torch.autograd.grad(got.square().sum(), leaf)
    (reference,) = torch.autograd.grad(expected.square().sum(), leaf)
    assert_close(gradient, reference)
