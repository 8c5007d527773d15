"""The model makes its own training prompts: the same for the same seed, kept on disk, answered with the full cache."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.training import study_prompts as study
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.own_questions import first_question, is_about, write_questions
from kvpress_moe.training.sampling import draw, repeating, request_ids, sample_texts
from kvpress_moe.training.shards import Shards
from kvpress_moe.training.study_prompts import greedy_answer, study_prompts
from kvpress_moe.training.trainer import interleave, made_prompts, train
from kvpress_moe.training.written_documents import (
    SHORTEST,
    SUBJECTS,
    WrittenDocument,
    as_title,
    clean,
    density,
    write_documents,
)
from tests.tiny import FAMILIES, byte_tokenizer, greedy, tiny_model

LENGTH = 256


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def served(request):
    """The tiny Llama with a tokenizer with a chat template, and with one without."""
    return tiny_model("llama"), byte_tokenizer(chat=request.param)


@pytest.fixture(scope="module")
def made(served, tmp_path_factory):
    """Eleven prompts, and the directory of their file."""
    directory = tmp_path_factory.mktemp("study")
    return study_prompts(*served, 11, LENGTH, 0, directory), directory


def ids(prompts):
    return [(name, *(part.tolist() for part in (p.context, p.question, p.answer)), p.n_prefix) for name, p in prompts]


def test_the_same_seed_makes_the_same_prompts_and_another_seed_others(served, tmp_path):
    one, again, other = (
        study_prompts(*served, 3, LENGTH, seed, tmp_path / name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert ids(one) == ids(again)
    assert ids(one) != ids(other)


def test_global_random_numbers_are_untouched(served, tmp_path):
    before = torch.get_rng_state()
    study_prompts(*served, 2, LENGTH, 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_call_reads_the_file_and_runs_no_model(served, made):
    prompts, directory = made
    model, tokenizer = served

    def refuse(*args, **kwargs):
        raise AssertionError("the model ran")

    handle = model.register_forward_pre_hook(refuse)
    inner = model.model.register_forward_pre_hook(refuse)
    try:
        again = study_prompts(model, tokenizer, 11, LENGTH, 0, directory)
    finally:
        handle.remove()
        inner.remove()
    assert ids(again) == ids(prompts)


def test_an_interrupted_run_continues_where_it_stopped(served, made, tmp_path, monkeypatch):
    prompts, _ = made
    answered = []

    def interrupted(*args):
        if len(answered) == 10:
            raise KeyboardInterrupt
        answered.append(args)
        return greedy_answer(*args)

    monkeypatch.setattr(study, "greedy_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study_prompts(*served, 11, LENGTH, 0, tmp_path)
    monkeypatch.setattr(study, "greedy_answer", lambda *args: answered.append(args) or greedy_answer(*args))
    for name in ("write_documents", "write_questions"):
        monkeypatch.delattr(study, name)
    answered.clear()
    assert ids(study_prompts(*served, 11, LENGTH, 0, tmp_path)) == ids(prompts)
    assert len(answered) == 3  # the first eight were on disk


def test_a_file_of_other_prompts_is_made_again(served, made):
    prompts, directory = made
    path = next(directory.glob("*.json"))
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "about": "something else"}))
    assert ids(study_prompts(*served, 11, LENGTH, 0, directory)) == ids(prompts)
    assert json.loads(path.read_text()) == json.loads(text)


@pytest.mark.parametrize("text", ["{", "[]", '{"documents": []}'])
def test_a_broken_file_is_named_in_the_error(served, tmp_path, text):
    (tmp_path / f"study-{LENGTH}-2-0.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"study-256-2-0.json cannot be read"):
        study_prompts(*served, 2, LENGTH, 0, tmp_path)


@pytest.mark.parametrize(
    ("field", "damage"),
    [
        ("documents", lambda documents: [{"title": "A", "text": 3}]),
        ("documents", lambda documents: [{"title": "A"}]),
        ("documents", lambda documents: 7),
        ("documents", lambda documents: [["title", "text"]]),
        ("questions", lambda questions: "?" * len(questions)),
        ("samples", lambda samples: [{**samples[0], "chat": False}, *samples[1:]]),
        ("samples", lambda samples: [{**samples[0], "depth": "x"}, *samples[1:]]),
        ("answers", lambda answers: {}),
        ("answers", lambda answers: [[2**30], *answers[1:]]),
        ("questions", lambda questions: questions[:-1]),
        ("questions", lambda questions: [3, *questions[1:]]),
        ("samples", lambda samples: samples[1:]),
        ("samples", lambda samples: [{**samples[0], "context": None}, *samples[1:]]),
        ("samples", lambda samples: [{"task": "study"}, *samples[1:]]),
        ("samples", lambda samples: None),
        ("answers", lambda answers: [[], *answers[1:]]),
        ("answers", lambda answers: [["one"], *answers[1:]]),
        ("answers", lambda answers: [*answers, [1]]),
        ("answers", lambda answers: None),
    ],
)
def test_wrong_contents_are_named_in_the_error(served, made, tmp_path, field, damage):
    original = next(made[1].glob("*.json"))
    contents = json.loads(original.read_text())
    (tmp_path / original.name).write_text(json.dumps({**contents, field: damage(contents[field])}))
    with pytest.raises(CheckpointError, match=rf"{original.name} cannot be read"):
        study_prompts(*served, 11, LENGTH, 0, tmp_path)


def test_contexts_have_the_lengths_in_turn(served, made):
    _, tokenizer = served
    prompts, directory = made
    samples = json.loads(next(directory.glob("*.json")).read_text())["samples"]
    for index, ((name, prompt), sample) in enumerate(zip(prompts, samples, strict=True)):
        n_tokens = len(tokenizer(sample["context"], add_special_tokens=False).input_ids)
        room = LENGTH - (index % 4) * LENGTH // 8
        assert 0.5 * room <= n_tokens <= room
        assert re.fullmatch(rf"study/train/{LENGTH}/{index}-[0-9a-f]{{12}}", name)
        assert sample["context"] in tokenizer.decode(prompt.context[0])
        assert sample["question"] in tokenizer.decode(prompt.question[0])


def test_a_length_without_room_is_refused(served, tmp_path):
    with pytest.raises(SettingError, match="lengths"):
        study_prompts(*served, 2, 100, 0, tmp_path)


def test_answers_are_the_greedy_continuation_of_the_full_cache(served, made):
    model, tokenizer = served
    for _, prompt in made[0]:
        tokens = torch.cat((prompt.context, prompt.question), dim=1)
        expected = greedy(model, tokens, DynamicCache(), 0, study.ANSWER_TOKENS)[0].tolist()
        found = prompt.answer[0].tolist()
        assert 1 <= len(found) <= study.ANSWER_TOKENS
        end = tokenizer.eos_token_id
        stopped = expected.index(end) if end in expected else len(expected)
        assert found == expected[:stopped] or stopped == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes(family, chat_tokenizer, tmp_path):
    prompts = study_prompts(tiny_model(family), chat_tokenizer, 1, LENGTH, 0, tmp_path)
    assert prompts[0][1].answer.shape[1] >= 1


def test_answers_end_at_the_end_token_but_have_one_token(chat_tokenizer):
    model = tiny_model("llama")
    prompt = encode(study.Sample("study", "train", 9, 0, "A text.", "Who?", "", " -", (), "tokens"), chat_tokenizer)
    whole = greedy_answer(model, chat_tokenizer, prompt)
    later = next(number for number, token in enumerate(whole) if token not in whole[:number] and number)
    model.generation_config.eos_token_id = [whole[later]]
    assert greedy_answer(model, chat_tokenizer, prompt) == whole[:later]
    model.generation_config.eos_token_id = whole[0]
    assert whole[0] != greedy_answer(model, chat_tokenizer, prompt)[0]


def test_texts_do_not_depend_on_padding(llama, tokenizer):
    """Sampled from the one likeliest token, a text is the greedy continuation, whatever stands beside it."""
    requests = [tokenizer(text).input_ids for text in ("a", "a longer request", "b and c")]
    generator = torch.Generator().manual_seed(0)
    texts = sample_texts(llama, tokenizer, requests, generator, 6, temperature=1.0, top_p=1e-6)
    for request, text in zip(requests, texts, strict=True):
        expected = greedy(llama, torch.tensor([request]), DynamicCache(), 0, 6)[0]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_draws_only_from_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    drawn = draw(logits, torch.Generator().manual_seed(0), temperature=1.0, top_p=0.75)
    shares = torch.bincount(drawn, minlength=4) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)


def test_only_long_repetitions_are_forbidden():
    assert repeating([1, 2, 3, 9, 1, 2], n_tokens=3) == [3]
    assert repeating([1, 2, 3, 9, 1], n_tokens=3) == []
    assert repeating([], n_tokens=3) == []


def test_requests_are_filled_up_with_new_lines(tokenizer, chat_tokenizer):
    for one in (tokenizer, chat_tokenizer):
        plain, filled = request_ids(one, "Write.", "Once"), request_ids(one, "Write.", "Once", 60)
        assert len(filled) == max(60, len(plain))
        assert one.decode(filled).replace("\n", "") == one.decode(plain).replace("\n", "")


def test_consecutive_subjects_are_of_different_fields():
    assert len(SUBJECTS) == len(set(SUBJECTS)) >= 240
    rows = [set(row) for row in zip(*[iter(SUBJECTS)] * 24, strict=True)]  # one subject of each of 24 fields
    assert len(rows) * 24 == len(SUBJECTS)


def test_documents_are_cut_after_a_sentence():
    assert clean("## A title\n\nIt is **old**. It is") == "A title\n\nIt is old."
    assert clean("He said “Yes.” And then") == "He said “Yes.”"
    assert clean("no end") == "no end"
    assert as_title("the Nile") == "Nile"
    assert as_title("a bank") == "Bank"


def test_texts_with_names_and_numbers_are_denser_than_repetitions():
    told = "Anna Berg sold 400 maps in Oslo. Her brother Nils drew them in 1902."
    assert density(told) > density("The map is a map. The map is the map of the map.") >= density("") == 0
    assert density(told) > density(told + " It is a map." * 20)


def test_documents_come_with_titles(served):
    documents = write_documents(*served, SUBJECTS[:9], 0, n_tokens=200, batch=4)
    titles = [as_title(subject) for subject in SUBJECTS[:9]]
    assert 4 <= len(documents) <= 9
    for document in documents:
        named = document.title in titles
        assert named or document.text.startswith(f"{document.title} ")  # a person's life, under the person's name
        assert len(document.text) >= SHORTEST


def test_questions_end_with_a_question_mark_and_some_are_fixed(served):
    passages = [WrittenDocument(f"Title {n}", "The mill at Arden was built in 1801. " * (n + 1)) for n in range(12)]
    questions = write_questions(*served, passages, 0, batch=5)
    assert len(questions) == 12
    assert "Title 5" in questions[5]
    assert "Title 11" in questions[11]
    assert all(question is None or len(question) > 9 for question in questions)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (" Who built it in Arden?\nText: more", "Who built it in Arden?"),
        ("Sure!\n1. **When was the mill built?** 1801", "When was the mill built?"),
        ("Question: Why is it red in March? Because.", "Why is it red in March?"),
        ("It was built in 1801.", None),
        ("", None),
    ],
)
def test_a_question_is_found_in_what_the_model_wrote(text, question):
    assert first_question(text) == question


def test_a_question_must_share_a_word_with_its_passage():
    passage = WrittenDocument("The mill", "The mill at Arden was built in 1801.")
    assert is_about("When was Arden's mill built?", passage)
    assert is_about("What happened in 1801?", passage)
    assert not is_about("What does the text say?", passage)
    assert not is_about("When was the mill sold to Tom?", passage)


def test_layouts_hold_every_document():
    documents = [WrittenDocument("One", "First one. Second one."), WrittenDocument("Two", "Third one.")]
    for layout in study._LAYOUTS:
        text = layout(documents, study.Random(0))
        assert all(sentence in text for sentence in ("First one.", "Second one.", "Third one."))


def test_fillers_are_cut_and_the_asked_document_is_not():
    documents = [WrittenDocument(f"Number {n}", f"Document {n} has words. " * 20) for n in range(5)]
    asked = replace(documents[0], title="Asked")
    for index in range(14):
        sample = study._sample([*documents, asked], asked, "Who?", len, 2000, index, 0)
        room = 2000 - (index % 4) * 250
        assert 0.8 * room <= len(sample.context) <= room
        assert sample.context.count("Document 0 has words.") >= 20


def test_training_takes_prompts_of_both_kinds_and_keeps_them_apart_from_those_of_another_run(tmp_path):
    served = tiny_model("llama"), byte_tokenizer(chat=True)
    config = TrainingConfig(
        long_samples=0,
        experts=("learned", "keydiff"),
        top_k=2,
        samples=3,
        study=2,
        length=300,
        tasks=("kv_list",),
        epochs=1,
        bottleneck=8,
        learned_width=8,
        end_to_end=1,
        transform_prompts=2,
    )
    _, metrics = train(*served, config, tmp_path)
    assert metrics["prompts"] == 5
    names = [name for name, _ in made_prompts(*served, config, tmp_path)]
    assert [name.startswith("study") for name in names] == [False, True, False, True, False]
    before = {path.name for path in Shards(tmp_path).names()}
    train(*served, replace(config, study=3), tmp_path)
    fresh = {path.name for path in Shards(tmp_path).names()} - before
    assert len(fresh) == 3  # another number of prompts means other documents


def test_two_lists_are_spread_evenly_among_each_other():
    assert interleave([1, 2, 3, 4], ["a", "b"]) == [1, "a", 2, 3, "b", 4]
    assert interleave([1, 2], []) == [1, 2]
