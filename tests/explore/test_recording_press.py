"""What is written down while a text is compressed: the press's own judgement, and the text piece by piece."""

import pytest
import torch

from kvpress_moe import MoERouterPress
from kvpress_moe.errors import SettingError
from kvpress_moe.explore import explore, make_press
from kvpress_moe.explore.page import as_json
from kvpress_moe.explore.payload import as_levels
from kvpress_moe.explore.tokens import mark_matches, pieces
from tests.explore.made import TEXT, calibrated_routers, reading, still

SETTINGS = {
    "uniform": {"budget": "uniform"},
    "one expert": {"experts": ["knorm"], "budget": "layer"},
    "calibrated": {"router": "calibrated", "budget": "global"},
    "calibrated, two of three": {"router": "calibrated", "top_k": 2},
}


@pytest.fixture(scope="module")
def read_text(llama, tokenizer):
    return reading(llama, tokenizer)


def made(llama, settings):
    settings = {"compression_ratio": 0.75} | settings
    if settings.get("router") == "calibrated":
        settings["router"] = calibrated_routers(llama)
        settings["experts"] = ["learned", "knorm", "tova"]
        settings.setdefault("top_k", 3)
    return settings


@pytest.mark.parametrize("name", SETTINGS)
def test_recording_changes_nothing_of_what_is_kept(llama, read_text, name):
    settings = made(llama, SETTINGS[name])
    press, plain = make_press(settings), MoERouterPress(**settings)
    recorded, expected = read_text.prefill.compress(press), read_text.prefill.compress(plain)
    for layer_idx, (ours, theirs) in enumerate(zip(recorded.layers, expected.layers, strict=True)):
        assert torch.equal(keys_of(ours), keys_of(theirs))
        kept = press.records[layer_idx].kept
        assert torch.equal(read_text.prefill.cache.layers[layer_idx].keys[0][kept], keys_of(ours))
    assert repr(press.get_stats()) == repr(plain.get_stats())


def keys_of(layer):
    return layer.flat_keys if hasattr(layer, "flat_keys") else layer.keys[0].flatten(0, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_experts_moves_add_up_to_the_scores(llama, read_text, name):
    press = make_press(made(llama, SETTINGS[name]))
    read_text.prefill.compress(press)
    for layer_idx, record in press.records.items():
        scores, calibration = record.scores, press.routers.layers[layer_idx].calibration
        if calibration is not None:
            scores = scores + calibration.fading(torch.arange(scores.shape[-1]).flip(0)[None])[0].detach()
        distance = scores - scores.mean(-1, keepdim=True)
        torch.testing.assert_close(record.moves.sum(1), distance, atol=1e-5, rtol=1e-4)
        idle = record.weights.T == 0  # (E, S)
        if idle.any() and name != "one expert":  # who has no say adds the same to all: nothing
            moves = record.moves.mean(0)
            assert (moves - moves.masked_fill(~idle, torch.nan).nanmean(-1, keepdim=True))[idle].abs().max() < 1e-6


def test_huge_and_infinite_scores_leave_a_page_of_numbers(read_text):
    def extreme(module, hidden_states, keys, values, attentions, kwargs):
        scores = keys.norm(dim=-1)
        scores[..., :4], scores[..., 4] = torch.finfo(torch.float32).max, torch.inf
        return scores

    press = make_press({"compression_ratio": 0.5, "experts": [extreme], "budget": "uniform"})
    payload = explore(read_text, press, still)
    assert "NaN" not in as_json(payload)
    assert press.records[0].kept[:, :5].all()


@pytest.mark.parametrize("ratio", [0, None])
def test_a_ratio_at_which_nothing_is_judged_is_refused(ratio):
    with pytest.raises(SettingError, match=r"ratio: got (0|None), expected a number in \(0, 1\)"):
        make_press({"compression_ratio": ratio})


def test_the_pieces_of_a_text_are_the_text_also_where_characters_take_several_tokens(tokenizer):
    text = "naïve 鹤吊十二吨 🏗️ <s> end"
    found = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(found) == text
    assert "🏗" in found
    assert "<s>" in found
    cut = tokenizer.encode("鹤", add_special_tokens=False)[:2]
    assert pieces(tokenizer, cut) == ["", "\ufffd"]


def test_answers_are_compared_token_by_token():
    full, compressed = mark_matches(["It", " is", " 7", "."], ["It", " is", " a", " code", "."])
    assert full == [["It", 1], [" is", 1], [" 7", 0], [".", 1]]
    assert compressed == [["It", 1], [" is", 1], [" a", 0], [" code", 0], [".", 1]]


def test_a_positive_weight_stays_positive():
    assert as_levels(torch.tensor([0.0, 1e-9, 0.5, 1.0])).tolist() == [0, 1, 32768, 65535]


def test_the_page_holds_every_token_and_both_answers(llama, tokenizer, read_text):
    payload = explore(read_text, make_press({"compression_ratio": 0.5}), still)
    assert "".join(payload["tokens"]) == "<s>" + TEXT
    answer = payload["answers"][0]
    assert "".join(piece for piece, _ in answer["full"]) == read_text.answers[0]
    assert payload["about"]["compressed_mib"] == pytest.approx(payload["about"]["full_mib"] / 2, rel=0.01, abs=0.01)
