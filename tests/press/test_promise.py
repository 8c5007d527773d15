"""max_kl: the press keeps what the promise says and not more, row by row, and refuses what cannot be promised."""

import logging
from dataclasses import dataclass

import kvpress
import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.measured_prompt import MeasuredPrompt
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.cache import PackedLayer, RaggedLayer
from kvpress_moe.cache.prefill import cache_bytes
from kvpress_moe.errors import CheckpointError, SettingError, UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.routers.checkpoint import PROMISES, load_routers, save_routers
from tests.tiny import calibrated_routers, decoder, padded_tokens, prefill, promised_routers, tiny_model, tokens

KINDS = ("mixed", None)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def routers(llama):
    return promised_routers(llama)


def bound_of(routers, precision) -> float:
    """A bound between those that can be promised: one that neither one pair nor the whole cache fulfils."""
    name = next(name for name in routers.promises if (name == "none") == (precision is None))
    low, high = routers.promises[name].bounds
    return low**0.25 * high**0.75


def press(routers, precision, /, **settings) -> MoERouterPress:
    given = {"router": routers, "precision": precision, "max_kl": bound_of(routers, precision), "confidence": 0.8}
    return MoERouterPress(**given | settings)


def same(one, other) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(one.layers, other.layers, strict=True)
        for a, b in zip(x.tensors, y.tensors, strict=True)
    )


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_keeps_what_the_same_ratio_would_keep(routers, precision, dtype):
    """In a 16-bit cache. With a precision, whole pairs of a float32 cache take more, so another ratio keeps them."""
    model = tiny_model("llama", dtype=dtype)
    made = press(routers, precision)
    cache = prefill(model, tokens(90), made)
    (report,) = made.get_stats()["promises"]
    assert 0.01 < report["share"] < 1
    if precision is None or dtype == torch.bfloat16:
        fixed = MoERouterPress(1 - report["share"], router=routers, precision=precision, cache_aware=False)
        assert same(cache, prefill(model, tokens(90), fixed))
    assert isinstance(cache.layers[0], RaggedLayer if precision is None else PackedLayer)


@pytest.mark.parametrize("precision", KINDS)
def test_the_press_decides_as_the_calibration_measured(llama, routers, precision):
    """The sight of a prompt that the calibration read is the one that the press has."""
    made = press(routers, precision)
    prefill(llama, tokens(90), made)
    (report,) = made.get_stats()["promises"]
    prompt = Prompt(tokens(90), tokens(4, seed=1), tokens(4, seed=2))
    measured = MeasuredPrompt(
        llama, prompt, {"one": MoERouterPress(router=routers, precision=precision, cache_aware=False)}
    )
    promise = made._find_promise()
    decision = promise.decide(measured.sights["one"], made.max_kl, made.confidence)
    assert decision.share == pytest.approx(report["share"], rel=1e-3)
    assert promise.curve(measured.sights["one"]).tolist() == pytest.approx(report["expected_kls"], rel=1e-3)


@pytest.mark.parametrize("precision", KINDS)
def test_divergences_are_measured_as_the_press_compresses(llama, routers, precision):
    """A cache of the measurement answers like a cache that the press compressed to the same share."""
    prompt = Prompt(tokens(90), tokens(4, seed=1), tokens(6, seed=2))
    plain = MoERouterPress(router=routers, precision=precision, cache_aware=False)
    measured = MeasuredPrompt(llama, prompt, {"one": plain})
    rest = torch.cat((prompt.question, prompt.answer[:, :-1]), dim=1)
    with torch.no_grad():
        full = llama(torch.cat((tokens(90), rest), dim=1), logits_to_keep=6).logits[0].log_softmax(-1)
    full_bytes = 2 * 90 * 2 * 2 * 8 * 2  # layers, tokens, heads, keys and values, width, bytes of a number
    for share in (0.12, 0.3, 0.6, 1.0):
        made = press(routers, precision, max_bytes=int(share * full_bytes), min_bytes=int(share * full_bytes))
        cache = prefill(llama, tokens(90), made)
        with torch.no_grad():
            own = llama(rest, **with_cache(cache), logits_to_keep=6).logits[0].log_softmax(-1)
        expected = float((full.exp() * (full - own)).sum(-1).mean())
        taken = made.get_stats()["promises"][0]["share"]
        assert taken == pytest.approx(share, rel=0.01)
        assert float(measured.divergences([("one", taken)])[0]) == pytest.approx(expected, rel=2e-3, abs=1e-5)
        if share == 1:
            assert expected == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("precision", KINDS)
def test_rows_of_a_batch_keep_what_each_needs(llama, routers, precision):
    batch = torch.cat([tokens(90, seed=seed) for seed in range(3)])
    made = press(routers, precision)
    cache = prefill(llama, batch, made)
    shares = [report["share"] for report in made.get_stats()["promises"]]
    assert len(set(shares)) == 3
    for row in range(3):
        alone = press(routers, precision)
        cache_alone = prefill(llama, batch[row : row + 1], alone)
        assert alone.get_stats()["promises"][0]["share"] == shares[row]
        for layer, layer_alone in zip(cache.layers, cache_alone.layers, strict=True):
            for (keys, _), (keys_alone, _) in zip(layer.heads()[row], layer_alone.heads()[0], strict=True):
                assert torch.allclose(keys, keys_alone, atol=1e-5)


@pytest.mark.parametrize("precision", KINDS)
def test_padded_rows_too(llama, routers, precision):
    input_ids, mask = padded_tokens([60, 90])
    made = press(routers, precision)
    with torch.no_grad(), made(llama):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()
        decoder(llama)(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    reports = made.get_stats()["promises"]
    assert [report["n_tokens"] for report in reports] == [60, 90]
    for row, length in enumerate((60, 90)):
        alone = press(routers, precision)
        prefill(llama, tokens(length, seed=row), alone)
        assert alone.get_stats()["promises"][0]["share"] == pytest.approx(reports[row]["share"], rel=1e-4)


@pytest.mark.parametrize("precision", KINDS)
def test_hard_bounds_on_the_bytes(routers, precision, caplog):
    model = tiny_model("llama", dtype=torch.bfloat16)
    free = cache_bytes(prefill(model, tokens(90), press(routers, precision)))
    made = press(routers, precision, max_bytes=int(0.6 * free))
    with caplog.at_level(logging.WARNING):
        cache = prefill(model, tokens(90), made)
    assert "max_bytes=" in caplog.text
    assert cache_bytes(cache) <= 0.6 * free
    (report,) = made.get_stats()["promises"]
    assert not report["is_enough"]
    more = cache_bytes(prefill(model, tokens(90), press(routers, precision, min_bytes=int(1.5 * free))))
    assert 1.4 * free <= more <= 1.6 * free
    everything = 2 * 90 * 2 * 2 * 8 * 2  # layers, tokens, heads, keys and values, width, bytes of a number
    whole = prefill(model, tokens(90), press(routers, precision, min_bytes=2 * everything))
    assert cache_bytes(whole) >= everything


def test_a_bound_that_no_cache_can_hold_is_refused_and_leaves_nothing(llama, routers):
    made = press(routers, "mixed", max_bytes=100)
    with pytest.raises(SettingError, match="max_bytes: got 100, expected at least"):
        prefill(llama, tokens(90), made)
    assert "promises" not in made.get_stats()
    assert not any(layer.self_attn._forward_hooks for layer in decoder(llama).layers)


def test_statistics_add_up_and_are_reset(llama, routers):
    made = press(routers, "mixed")
    for seed in range(2):
        prefill(llama, tokens(90, seed=seed), made)
    reports = made.get_stats()["promises"]
    assert len(reports) == 2
    for report in reports:
        assert len(report["shares"]) == len(report["expected_kls"])
        assert report["expected_kl"] <= made.max_kl
    made.reset_stats()
    assert "promises" not in made.get_stats()


def test_a_pass_that_fails_is_not_counted(llama, routers):
    made = press(routers, "mixed")
    prefill(llama, tokens(90), made)
    handle = llama.model.norm.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            prefill(llama, tokens(80), made)
    finally:
        handle.remove()
    assert [report["n_tokens"] for report in made.get_stats()["promises"]] == [90]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": 0}, "max_kl: got 0"),
        ({"max_kl": float("inf")}, "max_kl: got inf"),
        ({"max_kl": True}, "max_kl: got True"),
        ({"max_kl": 0.02, "confidence": 1}, "confidence: got 1"),
        ({"max_kl": 0.02, "confidence": 0}, "confidence: got 0"),
        ({"max_kl": 0.02, "max_bytes": 0}, "max_bytes: got 0"),
        ({"max_kl": 0.02, "max_bytes": 0.5}, "max_bytes: got 0.5"),
        ({"max_kl": 0.02, "max_bytes": 5, "min_bytes": 6}, "min_bytes: got 6, expected at most max_bytes = 5"),
        ({"max_bytes": 5}, "max_bytes: got 5, expected None without max_kl"),
        ({"min_bytes": 5}, "min_bytes: got 5, expected None without max_kl"),
        ({"max_kl": 0.02, "compression_ratio": 0.9}, "compression_ratio: got 0.9, expected none with max_kl"),
        ({"max_kl": 0.02, "compression_ratio": None}, "compression_ratio: got None, expected none with max_kl"),
        ({"max_kl": 0.02, "budget": "uniform"}, "budget: got 'uniform'"),
        ({"max_kl": 0.02, "track_misses": True}, "track_misses: got True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_contradict_are_refused_at_once(settings, message):
    with pytest.raises(SettingError, match=message):
        MoERouterPress(**settings)
    made = MoERouterPress()
    *first, last = settings.items()
    for name, value in first:
        setattr(made, name, value)
    before = getattr(made, last[0])
    with pytest.raises(SettingError):
        setattr(made, *last)
    assert getattr(made, last[0]) == before


def test_what_the_routers_cannot_promise_is_refused_before_the_prompt_is_read(llama, routers):
    cases = [
        (MoERouterPress(max_kl=0.02), "never calibrated"),
        (MoERouterPress(router=calibrated_routers(llama), max_kl=0.02), "never calibrated"),
        (press(routers, "mixed", precision=[(8, 4)]), "precision: got"),
        (press(routers, "mixed", max_kl=1e-9), "max_kl: got 1e-09, expected a bound within the calibrated range"),
        (press(routers, "mixed", confidence=0.99), "confidence: got 0.99"),
        (press(routers, "mixed", min_share=0.5), "min_share: got 0.5, expected 0.2"),
        (press(routers, "mixed", top_k=1), "top_k: got 1"),
        (press(routers, "mixed", capacity_factor=3.0), "capacity_factor: got 3.0"),
    ]
    for made, message in cases:
        with pytest.raises(SettingError, match=message), made(llama):
            pass
        assert not any(layer.self_attn._forward_hooks for layer in decoder(llama).layers)


def test_a_promise_without_a_precision_that_was_made_with_another_minimum_is_refused(llama, routers):
    other = promised_routers(llama)
    for promise in other.promises.values():
        del promise.about["min_pairs"]  # as promises were before
    with pytest.raises(SettingError, match=r"at least 40 pairs \(theirs: 0\)"), press(other, None)(llama):
        pass
    with press(other, "mixed")(llama):
        pass  # bytes have no such minimum


def test_wrappers_and_eager_attention_are_refused(llama, routers):
    for wrapped in (kvpress.ChunkPress, kvpress.AdaKVPress, kvpress.DMSPress):
        made = press(routers, None)
        wrapper = wrapped(made, threshold=0.0) if wrapped is kvpress.DMSPress else wrapped(made)
        with pytest.raises(SettingError, match="max_kl"):
            prefill(llama, tokens(90), wrapper)
    eager = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(SettingError, match="max_kl: got .* None with eager attention"), press(routers, None)(eager):
        pass


def test_promises_are_saved_with_their_routers_and_loaded_again(llama, routers, tmp_path):
    save_routers(routers, tmp_path)
    again = load_routers(tmp_path)
    shares = []
    for some in (routers, again):
        made = press(routers, "mixed", router=some)
        prefill(llama, tokens(90), made)
        shares.append(made.get_stats()["promises"][0]["share"])
    assert shares[0] == pytest.approx(shares[1], rel=0.05)
    others = calibrated_routers(llama, seed=1)
    others.promises = routers.promises
    save_routers(others, tmp_path / "others")
    with pytest.raises(CheckpointError, match="of other weights or key transforms"):
        load_routers(tmp_path / "others")
    save_routers(calibrated_routers(llama), tmp_path)  # others take their place
    assert not (tmp_path / PROMISES).exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"none": {}}', '{"none": {"mean": [0, 1]}}', '{"none": {"mean": 3}}'])
def test_a_broken_file_of_promises_is_refused_by_name(routers, tmp_path, text):
    save_routers(routers, tmp_path)
    (tmp_path / PROMISES).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_routers(tmp_path)


def test_layers_with_sliding_windows_are_left_out():
    model = tiny_model("gemma3_text")
    routers = promised_routers(model, n_prompts=12)
    made = press(routers, "mixed")
    prefill(model, tokens(90), made)
    (report,) = made.get_stats()["promises"]
    assert 0 < report["share"] <= 1
    assert len(routers.promises["none"].estimate.mean) == 1 + 2 * 2  # two layers with full attention


def test_earlier_prompts_do_not_change_what_a_prompt_keeps(llama, routers):
    """Feedback would: with a promise it is off, whatever ``cache_aware`` says, and back when the promise is gone."""
    made = press(routers, "mixed")
    for seed in (0, 1, 2, 0):
        prefill(llama, tokens(90, seed=seed), made)
    shares = [report["share"] for report in made.get_stats()["promises"]]
    assert shares[0] == shares[3]
    assert not any(layer.cache_aware for layer in made.routers.layers)
    made.max_kl = None
    assert all(layer.cache_aware for layer in made.routers.layers)
    made.max_kl = 0.02
    assert not any(layer.cache_aware for layer in made.routers.layers)


def test_a_subclass_may_have_another_default_ratio(llama, routers):
    @dataclass
    class Strict(MoERouterPress):
        compression_ratio: float | None = 0.9

    made = Strict(router=routers, max_kl=bound_of(routers, None), confidence=0.8)
    prefill(llama, tokens(90), made)
    assert made.get_stats()["promises"]
    with pytest.raises(SettingError, match=r"compression_ratio: got 0\.5"):
        Strict(0.5, max_kl=0.02)


def test_a_batch_in_a_static_cache_is_refused_by_what_is_wrong_with_it(llama, routers):
    cache = StaticCache(config=llama.config, max_cache_len=200)
    with pytest.raises((SettingError, UnsupportedInputError)) as refused:
        prefill(llama, torch.cat([tokens(90, seed=seed) for seed in range(2)]), press(routers, None), cache)
    assert "padded" not in str(refused.value)


@pytest.mark.parametrize("precision", KINDS)
def test_generate_with_beams_and_a_second_turn(routers, precision):
    """What generate does around the press: its own cache, rows for beams, and new tokens on a compressed cache."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    made = press(routers, precision)
    with made(model):
        greedy = model.generate(tokens(90), max_new_tokens=5, do_sample=False)
        model.generate(tokens(90), max_new_tokens=5, do_sample=False, num_beams=2)
    first, *beams = made.get_stats()["promises"]
    assert {report["share"] for report in beams} == {first["share"]}
    fixed = MoERouterPress(1 - first["share"], router=routers, precision=precision, cache_aware=False)
    with fixed(model):
        assert torch.equal(model.generate(tokens(90), max_new_tokens=5, do_sample=False), greedy)

    cache = prefill(model, tokens(90), press(routers, precision))
    kept = cache_bytes(cache)
    with torch.no_grad():
        model(tokens(7, seed=3), **with_cache(cache))
    assert cache.get_seq_length() == 97
    assert cache_bytes(cache) == kept + 7 * 2 * 2 * 2 * 8 * 2  # nothing of a second turn is evicted
