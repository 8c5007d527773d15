"""
``with press(model): model.generate(...)``: the prompt is compressed once and by the exact number of pairs, generation
goes on with what is left, and the model comes out as it went in.
"""

import pytest
import torch
from kvpress.utils import compute_n_kept
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from tests.tiny import decoder, greedy, kept_positions, lengths, prefill, tokens

PROMPT = 101


def generate(model, input_ids, max_new_tokens, **settings):
    """Greedy (or beam) search with a cache of our own, to look into afterwards."""
    cache = DynamicCache()
    output = model.generate(
        input_ids, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, **settings
    )
    return output, cache


def hooks(model):
    """Every hook on every module."""
    return {
        (name, kind, key)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        for key in getattr(module, kind)
    }


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("max_new_tokens", [1, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_cache_holds_the_kept_pairs_and_all_new_tokens_but_the_last(llama, ratio, max_new_tokens, batch_size):
    with MoERouterPress(compression_ratio=ratio)(llama):
        output, cache = generate(llama, tokens(PROMPT, batch_size), max_new_tokens)
    assert output.shape == (batch_size, PROMPT + max_new_tokens)
    assert lengths(cache) == [compute_n_kept(PROMPT, ratio) + max_new_tokens - 1] * 2


def test_the_prompt_is_compressed_once(llama):
    press = MoERouterPress()
    with press(llama):
        generate(llama, tokens(PROMPT), 8)
    stats = press.get_stats()
    assert stats["forward_count"] == 1
    assert [layer["router_stats"]["total_tokens"] for layer in stats["layer_stats"].values()] == [PROMPT, PROMPT]


def test_every_prompt_inside_the_block_is_compressed(llama):
    press = MoERouterPress()
    with press(llama):
        for n_tokens in (60, 90):
            _, cache = generate(llama, tokens(n_tokens), 1)
            assert lengths(cache) == [n_tokens // 2] * 2
    assert press.get_stats()["forward_count"] == 2


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_prompts_of_a_few_tokens_work(llama, n_tokens):
    with MoERouterPress(compression_ratio=0.8)(llama):
        output, cache = generate(llama, tokens(n_tokens), 4)
    assert output.shape == (1, n_tokens + 4)
    assert lengths(cache) == [1 + 3] * 2  # at least one pair stays


def test_ratio_zero_answers_as_without_a_press(llama):
    without, _ = generate(llama, tokens(PROMPT), 8)
    with MoERouterPress(compression_ratio=0)(llama):
        output, cache = generate(llama, tokens(PROMPT), 8)
    assert torch.equal(output, without)
    assert lengths(cache) == [PROMPT + 7] * 2


def test_ratio_none_keeps_as_many_in_every_layer(llama):
    with MoERouterPress(compression_ratio=None)(llama):
        output, cache = generate(llama, tokens(PROMPT), 4)
    first, second = lengths(cache)
    assert first == second < PROMPT
    assert output.shape == (1, PROMPT + 4)


def test_a_prompt_in_a_batch_is_treated_as_alone(llama):
    prompts = tokens(PROMPT, 3)
    with MoERouterPress(cache_aware=False)(llama):
        together, cache = generate(llama, prompts, 8)
        for row in range(3):
            alone, own_cache = generate(llama, prompts[row : row + 1], 8)
            assert torch.equal(together[row], alone[0])
            torch.testing.assert_close(cache.layers[1].keys[row], own_cache.layers[1].keys[0])


def test_generate_answers_as_a_loop_over_the_compressed_cache(llama):
    prompt = tokens(PROMPT)
    press = MoERouterPress(compression_ratio=0.7, cache_aware=False)
    with press(llama):
        output, _ = generate(llama, prompt, 8)
    cache = prefill(llama, prompt[:, :-1], None)
    full = greedy(llama, prompt[:, -1:], cache, PROMPT - 1, 1)
    assert torch.equal(output[:, PROMPT : PROMPT + 1], full)  # the first token still sees the whole prompt
    rest = greedy(llama, full, prefill(llama, prompt, press), PROMPT, 7)
    assert torch.equal(output[:, PROMPT + 1 :], rest)


def test_generation_goes_on_after_the_block_with_the_compressed_cache(llama):
    prompt = tokens(PROMPT)
    press = MoERouterPress(cache_aware=False)
    with press(llama):
        whole, _ = generate(llama, prompt, 8)
        begun, cache = generate(llama, prompt, 4)
    n_kept = compute_n_kept(PROMPT, 0.5)
    rest = greedy(llama, begun[:, -1:], cache, PROMPT + 3, 4)
    assert torch.equal(torch.cat((begun, rest), dim=1), whole)
    assert lengths(cache) == [n_kept + 7] * 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_beam_search_works(llama, batch_size):
    with MoERouterPress()(llama):
        output, cache = generate(llama, tokens(PROMPT, batch_size), 6, num_beams=2)
    assert output.shape == (batch_size, PROMPT + 6)
    assert lengths(cache) == [compute_n_kept(PROMPT, 0.5) + 5] * 2
    assert cache.layers[0].keys.shape[0] == 2 * batch_size


def test_beam_search_scores_its_answer_as_a_forward_pass_does(llama):
    prompt = tokens(PROMPT)
    press = MoERouterPress(cache_aware=False)
    with press(llama):
        output = llama.generate(
            prompt, max_new_tokens=6, num_beams=2, do_sample=False, length_penalty=0.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    answer = output.sequences[:, PROMPT:]
    with torch.no_grad():
        first = llama(prompt).logits[:, -1:]
        cache = prefill(llama, prompt, press)
        positions = torch.arange(PROMPT, PROMPT + 5)[None]
        later = llama(answer[:, :-1], past_key_values=cache, position_ids=positions).logits
    log_probs = torch.cat((first, later), dim=1).log_softmax(-1).gather(-1, answer[..., None])
    torch.testing.assert_close(log_probs.sum(), output.sequences_scores[0], atol=1e-4, rtol=1e-4)


# ── the model comes out as it went in ────────────────────────────────────────────────────────────────────────────────


def test_hooks_are_gone_and_prompts_stay_whole_after_the_block(llama):
    before = hooks(llama)
    press = MoERouterPress()
    with press(llama):
        assert hooks(llama) > before
        generate(llama, tokens(PROMPT), 2)
    assert hooks(llama) == before
    assert lengths(prefill(llama, tokens(PROMPT))) == [PROMPT] * 2


def test_hooks_are_gone_after_an_error_in_the_block(llama):
    before = hooks(llama)
    with pytest.raises(KeyError, match="mine"), MoERouterPress()(llama):
        raise KeyError("mine")
    assert hooks(llama) == before


def test_hooks_are_gone_after_an_error_in_an_expert(llama):
    def broken(*_):
        raise ZeroDivisionError("mine")

    before = hooks(llama)
    press = MoERouterPress(experts=[broken])
    with pytest.raises(RuntimeError, match=r"'broken' failed on layer 0.*mine"), press(llama):
        generate(llama, tokens(PROMPT), 2)
    assert hooks(llama) == before
    assert lengths(prefill(llama, tokens(PROMPT))) == [PROMPT] * 2


@pytest.mark.parametrize("error", [None, KeyError("mine")])
def test_modules_and_weights_are_the_same_after_the_block(llama, error):
    for layer in decoder(llama).layers:  # kvpress's own presses, in other tests, leave theirs behind
        layer.self_attn._modules.pop("rotary_emb", None)
    modules = {name: id(module) for name, module in llama.named_modules()}
    weights = {name: weight.clone() for name, weight in llama.state_dict().items()}
    try:
        with MoERouterPress()(llama):
            generate(llama, tokens(PROMPT), 4)
            if error:
                raise error
    except KeyError:
        pass
    assert {name: id(module) for name, module in llama.named_modules()} == modules
    assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in decoder(llama).layers)
    after = llama.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_a_press_without_feedback_does_the_same_twice(llama):
    press = MoERouterPress(cache_aware=False)
    first, second = (prefill(llama, tokens(PROMPT), press) for _ in range(2))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_kept_pairs_are_the_prompts_own_in_their_order(llama):
    full, compressed = prefill(llama, tokens(PROMPT)), prefill(llama, tokens(PROMPT), MoERouterPress())
    for before, after, positions in zip(full.layers, compressed.layers, kept_positions(full, compressed), strict=True):
        assert bool((positions.diff(dim=-1) > 0).all())
        assert torch.equal(before.values.gather(2, positions[..., None].expand_as(after.values)), after.values)
