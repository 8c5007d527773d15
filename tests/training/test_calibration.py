"""Calibration: pieces of texts, measurements that survive an interruption, and the command from texts to a promise."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.cli import app
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.routers.checkpoint import PROMISES, load_routers, save_promises, save_routers
from kvpress_moe.training import calibration
from kvpress_moe.training.calibration import BYTE_SHARES, PAIR_SHARES, calibrate, measure, task_prompts, tensors
from kvpress_moe.training.text_prompts import contexts, read_texts, text_prompts
from tests.tiny import calibrated_routers, prefill, promised_routers, tokens

TEXT = "".join(
    f"The lease of mill {n} was signed by Anna Brandt in {1900 + n}.\nIts wheel stood still.\n\n" for n in range(40)
)


def prompts(n: int, first: int = 0) -> list[Prompt]:
    return [Prompt(*(tokens(k, seed=first + 3 * i + j) for j, k in enumerate((60, 4, 4)))) for i in range(n)]


def test_pieces_of_texts_do_not_overlap_and_end_with_lines(chat_tokenizer):
    found = contexts({"mill": TEXT, "short": "Too short."}, chat_tokenizer, 300, 5, seed=0)
    assert len(set(found)) == 5
    for name, piece in found:
        assert name == "mill"
        assert piece in TEXT
        assert 225 <= len(piece) <= 300  # a byte is a token
        assert piece.endswith("\n")
    ordered = contexts({"mill": TEXT}, chat_tokenizer, 300, 11, seed=1)
    starts = sorted(TEXT.find(piece) for _, piece in ordered)
    assert starts[0] == 0
    assert sum(len(piece) for _, piece in ordered) <= len(TEXT)


def test_too_few_texts_are_refused_with_their_number(chat_tokenizer, tmp_path):
    with pytest.raises(SettingError, match="prompts: got 50, expected at most 1[0-9], the number of pieces"):
        contexts({"mill": TEXT}, chat_tokenizer, 300, 50, seed=0)
    with pytest.raises(SettingError, match="texts: got .* a directory with texts"):
        read_texts(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SettingError, match="a readable text in UTF-8"):
        read_texts(tmp_path)


def test_prompts_about_texts_ask_and_answer(llama, chat_tokenizer):
    pieces = contexts({"mill": TEXT}, chat_tokenizer, 300, 3, seed=0)
    made = text_prompts(llama, chat_tokenizer, pieces, seed=0)
    for (_, piece), prompt in zip(pieces, made, strict=True):
        assert piece in chat_tokenizer.decode(prompt.context[0])
        assert prompt.question.shape[1] > 1
        assert 1 <= prompt.answer.shape[1] <= 32
    again = text_prompts(llama, chat_tokenizer, pieces, seed=0)
    assert all(
        torch.equal(a.answer, b.answer) and torch.equal(a.question, b.question)
        for a, b in zip(made, again, strict=True)
    )


def test_kinds_of_questions_do_not_follow_from_texts_that_take_turns(llama, chat_tokenizer, monkeypatch):
    places = {}

    def written(model, tokenizer, passages, *_, **__):
        places.update({passage.title: number for number, passage in enumerate(passages)})
        return [f"What does piece {passage.title} say?" for passage in passages]

    monkeypatch.setattr("kvpress_moe.training.text_prompts.write_questions", written)
    monkeypatch.setattr("kvpress_moe.training.text_prompts.greedy_answer", lambda *_: [1])
    made = text_prompts(llama, chat_tokenizer, [(f"{n}", f"Piece {n}: {TEXT[:200]}") for n in range(36)], seed=0)
    for number, prompt in enumerate(made):
        assert f"Piece {number}: " in chat_tokenizer.decode(prompt.context[0])
        assert f"piece {number} say?" in chat_tokenizer.decode(prompt.question[0])
    general = [number for number in range(36) if places[f"{number}"] % 6 == 5]
    assert len({number % 6 for number in general}) > 2  # with six texts in turn, they would all be of one


def test_an_interrupted_run_measures_only_what_is_missing(llama, tmp_path, monkeypatch):
    press = MoERouterPress(router=calibrated_routers(llama))
    press.post_init_from_model(llama)
    store = tmp_path / "measured.jsonl"
    first = measure(llama, prompts(3), {"None": press}, store)
    with store.open("a") as file:
        file.write('{"key": "half')
    measured = []
    own = calibration._measure
    monkeypatch.setattr(calibration, "_measure", lambda *given: measured.append(given) or own(*given))
    both = measure(llama, prompts(5), {"None": press}, store)
    assert len(measured) == 2
    assert measure(llama, prompts(5), {"None": press}, store) == both
    assert len(measured) == 2
    assert both["None"][:3] == first["None"]
    store.write_text("nonsense\n" + store.read_text())
    with pytest.raises(CheckpointError, match="shards: .* cannot be read"):
        measure(llama, prompts(5), {"None": press}, store)


def test_other_routers_are_measured_anew(llama, tmp_path):
    store, found = tmp_path / "measured.jsonl", []
    for seed in (0, 1):
        press = MoERouterPress(router=calibrated_routers(llama, seed=seed))
        press.post_init_from_model(llama)
        found.append(measure(llama, prompts(1), {"None": press}, store)["None"][0])
    assert found[0].features != found[1].features


def test_another_minimum_is_measured_anew(llama, tmp_path, monkeypatch):
    press = MoERouterPress(router=calibrated_routers(llama))
    press.post_init_from_model(llama)
    store = tmp_path / "measured.jsonl"
    for least in (40, 3):
        monkeypatch.setattr(calibration, "MIN_PAIRS", least)
        measure(llama, prompts(1), {"None": press}, store)
    assert len(store.read_text().splitlines()) == 2


def test_no_prompt_both_fits_and_calibrates(llama, monkeypatch):
    asked = []
    own = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda *given: asked.append(given[1]) or own(*given))
    about = {"prompts": "random", "seed": 1}
    calibrate(
        llama, calibrated_routers(llama), [None], prompts(6), lambda: prompts(40), about
    )  # the first 6 are the same
    fitted, calibrating = asked
    assert [len(fitted), len(calibrating)] == [34, 6]
    assert not any(torch.equal(a.context, b.context) for a in fitted for b in calibrating)


def test_calibration_fits_once_and_then_only_measures_new_margins(llama):
    routers = calibrated_routers(llama)
    about = {"prompts": "random", "seed": 1}
    routers.promises = calibrate(llama, routers, ["mixed", None], prompts(6), lambda: prompts(8, 500), about)
    assert [p.shares.tolist() for p in routers.promises.values()] == [list(BYTE_SHARES), list(PAIR_SHARES)]

    def never() -> list[Prompt]:
        raise AssertionError("there is an estimate already")

    again = calibrate(llama, routers, [None], prompts(9, 900), never, about)
    (promise,) = again.values()
    assert promise.n_prompts == 9
    assert torch.equal(promise.estimate.weights, routers.promises["none"].estimate.weights)


def test_an_adapted_estimate_is_calibrated_with_other_prompts(llama, tmp_path):
    routers = promised_routers(llama)
    about = {"prompts": "random", "seed": 1}

    def never() -> list[Prompt]:
        raise AssertionError("there is an estimate already")

    adapting, calibrating = prompts(8, 300), prompts(9, 900)
    (plain,) = calibrate(llama, routers, [None], calibrating, never, about).values()
    (found,) = calibrate(llama, routers, [None], calibrating, never, about, adapt=adapting).values()
    assert torch.equal(found.divergences, plain.divergences)
    press = MoERouterPress(router=routers)
    press.post_init_from_model(llama)
    seen = tensors(measure(llama, adapting, {"None": press})["None"])
    wanted = routers.promises["none"].estimate.adapted(*seen, found.shares)
    assert torch.equal(found.estimate.weights, wanted.weights)
    assert torch.equal(found.estimate.slopes, wanted.slopes)
    assert (plain.about["adapted_to"], found.about["adapted_to"]) == (0, 8)

    # Prompts that an estimate was adapted to may calibrate later. So it starts from the one that has not seen them.
    save_routers(routers, tmp_path)
    save_promises({"none": found}, tmp_path, tmp_path)
    routers.promises = load_routers(tmp_path).promises
    (again,) = calibrate(llama, routers, [None], adapting, never, about).values()
    (other,) = calibrate(llama, routers, [None], adapting, never, about, adapt=calibrating).values()
    for one in (again.estimate, other.unadapted):
        assert torch.allclose(one.weights, plain.estimate.weights, rtol=1e-2)
        assert torch.allclose(one.slopes, plain.estimate.slopes, rtol=1e-3)
    assert again.unadapted is None


def test_prompts_that_adapt_are_looked_at_before_the_others_are_measured(llama, monkeypatch):
    routers, counted = promised_routers(llama), []
    own = calibration._measure

    def harmless(model, prompt, presses):
        counted.append(prompt)
        return {
            name: {**of, "divergences": [1e-7] * len(of["divergences"])}
            for name, of in own(model, prompt, presses).items()
        }

    monkeypatch.setattr(calibration, "_measure", harmless)
    with pytest.raises(SettingError, match="adapt: got 8, expected 2 prompts or more, with at least 20 KL"):
        calibrate(llama, routers, [None], prompts(9, 900), list, {"prompts": "r", "seed": 1}, adapt=prompts(8, 300))
    assert len(counted) == 8


def test_built_in_prompts_are_of_the_tune_split_and_of_three_lengths(chat_tokenizer):
    made = task_prompts(chat_tokenizer, 45, 2000, seed=1, limit=4096)
    lengths = [prompt.context.shape[1] for prompt in made]
    assert max(lengths) <= 2100
    assert min(lengths) < 1100  # a few are half as long
    others = task_prompts(chat_tokenizer, 45, 2000, seed=0, limit=4096)
    assert not any(torch.equal(a.context, b.context) for a, b in zip(made, others, strict=True))


def command(*arguments: str):
    return CliRunner().invoke(app, ["calibrate", *arguments])


def test_the_command_calibrates_for_texts_and_leaves_the_weights_alone(tmp_path, model_directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    save_routers(promised_routers(model), tmp_path / "routers")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "mill.txt").write_text(TEXT)
    common = ("--model", str(model_directory), "--router", str(tmp_path / "routers"), "--texts", str(texts))
    result = command(*common, "--out", str(tmp_path / "new"), "--prompts", "17", "--length", "200")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["prompts"], summary["adapted_to"]) == (17, 8)
    assert summary["highest_confidence"] == 0.9
    for name in ("routers.safetensors", "routers.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "routers" / name).read_bytes()
    promises = load_routers(tmp_path / "new").promises
    assert {(promise.about["prompts"], promise.n_prompts) for promise in promises.values()} == {("texts: texts", 9)}
    low, high = promises["none"].bounds
    made = MoERouterPress(router=tmp_path / "new", max_kl=(low * high) ** 0.5)
    prefill(model, tokens(90), made)
    assert made.get_stats()["promises"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "20", "--confidence", "0.99"], "prompts: got 20, expected at least 99: 99 for confidence 0.99"),
        (
            ["--prompts", "16", "--texts", "."],
            "at least 17: 9 for confidence 0.9; 8 more adapt the estimate. For example",
        ),
        (["--prompts", "130", "--texts", ".", "--confidence", "0.99"], "at least 131: 99 for confidence 0.99; 32 more"),
        (["--adapt", "-1"], "adapt: got -1"),
        (["--adapt", "7"], "adapt: got 7, expected 0, or at least 8"),
        (["--adapt", "95"], "prompts: got 100, expected at least 104: 9 for confidence 0.9; 95 more"),
        (["--confidence", "1.5"], "confidence: got 1.5"),
        (["--prompts", "1"], "prompts: got 1"),
        (["--fit", "3"], "fit: got 3"),
        (["--seed", "0"], "seed: got 0"),
        (["--length", "5"], "length: got 5"),
        (["--precision", "k9v9"], "precision: got 'k9v9'"),
        (["--texts", "no/such/directory"], "texts: got 'no/such/directory'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named_before_a_model_is_loaded(tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *_: 1 / 0)
    result = command("--out", str(tmp_path / "out"), *arguments)
    assert message in str(result.exception), result.output
    assert not (tmp_path / "out" / PROMISES).exists()


def test_an_estimate_needs_two_prompts_of_each_kind(tmp_path):
    few = str(2 * len(calibration.KINDS) - 1)
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "new"), "--fit", few])
    assert result.exit_code != 0
    assert f"fit: got {few}, expected" in str(result.exception or result.output)
