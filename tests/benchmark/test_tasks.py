"""Samples are determined by their names, have the length asked for, and hold what they ask about."""

import json

import pytest
import torch

from kvpress_moe.benchmark.cache_eval import Answer
from kvpress_moe.benchmark.metrics import score
from kvpress_moe.benchmark.tasks import SPLITS, TASKS, find_tasks, make_sample
from kvpress_moe.benchmark.tasks.continuation import beginning
from kvpress_moe.benchmark.tasks.filling import fill, hide, swept_depth
from kvpress_moe.benchmark.tasks.hub import load_hub_samples
from kvpress_moe.benchmark.tasks.texts import modules, sentences, topics
from kvpress_moe.benchmark.tasks.vocabulary import (
    belongings,
    cities,
    colours,
    courses,
    dishes,
    firms,
    foods,
    instruments,
    keys,
    languages,
    nouns,
    novels,
    people,
    pets,
    spices,
    streets,
    vegetables,
)
from kvpress_moe.errors import SettingError


def count_tokens(text):
    """Four characters a token."""
    return -(-len(text) // 4)


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path_factory, monkeypatch):
    """What ``datasets`` makes of a file does not stay in the user's cache."""
    try:
        import datasets.config
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_sample_and_others_another(task):
    sample = make_sample(task, count_tokens, 1024, 3, seed=1)
    assert make_sample(task, count_tokens, 1024, 3, seed=1) == sample
    assert make_sample(task, count_tokens, 1024, 4, seed=1).context != sample.context
    assert make_sample(task, count_tokens, 1024, 3, seed=2).context != sample.context
    assert sample.id == f"{task}/test/1024/3"


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_contexts_have_the_length_asked_for(task, length):
    for split in SPLITS:
        n_tokens = count_tokens(make_sample(task, count_tokens, length, 0, split=split).context)
        assert 0.8 * length <= n_tokens <= length


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("prose", "code")])
@pytest.mark.parametrize("index", range(5))
def test_the_context_holds_the_answer(task, index):
    sample = make_sample(task, count_tokens, 1024, index)
    for reference in sample.references:
        assert reference in sample.context or task == "counting"
        assert reference in sample.answer
    if task == "copy":
        assert sample.answer_prefix + sample.answer in sample.context
    assert sample.metric == ("tokens" if task == "copy" else "exact" if len(sample.references) == 1 else "f1")


@pytest.mark.parametrize("task", ["needle_noise", "needle_prose_8", "kv_list"])
def test_depths_are_swept(task):
    found = []
    for index in range(10):
        sample = make_sample(task, count_tokens, 2048, index)
        found.append(sample.context.index(sample.answer.strip()) / len(sample.context))
        assert found[-1] == pytest.approx(sample.depth, abs=0.12)
    assert min(found) < 0.2
    assert max(found) > 0.8


def test_two_hops_need_the_firm():
    sample = make_sample("qa_two_hop", count_tokens, 1024, 0)
    person = sample.question.split("that ")[1].split(" works")[0]
    firm = sample.context.split(f"{person} is a trained ")[1].split("works for ")[1].split(".")[0]
    assert f"The head office of {firm} is in{sample.answer}." in sample.context
    assert firm not in sample.question + sample.answer_prefix


def test_the_chain_of_variables_leads_to_the_value():
    sample = make_sample("variable_tracking", count_tokens, 2048, 0)
    body = sample.context.split("hidden in the following text.")[1]
    value = sample.question.split("value ")[1].split(" ")[0]
    known = {value}
    for assignment in body.split("VAR ")[1:]:
        if " = " in assignment:
            name, source = assignment.split(" = ")[0], assignment.split(" = ")[1].split(" ")[0].strip()
            source = source or body.split(f"VAR {name} = VAR ")[1].split(" ")[0]
            if source in known:
                known.add(name)
    assert known - {value} >= {sample.references[0]}
    for old, new in zip(sample.references, sample.references[1:], strict=False):
        assert f"VAR {new} = VAR {old}" in body
        assert body.index(f"VAR {old} =") < body.index(f"VAR {new} =")


def test_frequent_words_are_the_most_frequent():
    sample = make_sample("frequent_words", count_tokens, 1024, 0)
    listed = sample.context.split("\n")[1].split(", ")
    ranked = sorted(set(listed), key=listed.count, reverse=True)
    assert set(ranked[:3]) == set(sample.references)
    assert listed.count(ranked[2]) > 1.2 * listed.count(ranked[3])


@pytest.mark.parametrize("share", [keys, people, firms, cities, nouns, topics, modules, sentences])
def test_splits_share_nothing(share):
    check_disjoint(share)


@pytest.mark.parametrize(
    "share", [belongings, colours, courses, dishes, foods, instruments, languages, novels, pets, spices, streets]
)
def test_splits_share_no_values(share):
    check_disjoint(share)
    assert not set(vegetables("train")) & set(vegetables("test"))


def check_disjoint(share):
    train, tune, test = (set(share(split)) for split in SPLITS)
    assert min(len(train), len(tune), len(test)) > 3
    assert not train & tune
    assert not train & test
    assert not tune & test


def test_filling_takes_what_fits_and_hides_at_depths():
    pieces = fill(iter(["aaaa"] * 50), 20, len)
    assert pieces == ["aaaa"] * 4  # each costs five with its space
    assert hide(["a", "b", "c", "d"], [(1.0, "z"), (0.0, "x"), (0.5, "y")]) == ["x", "a", "b", "y", "c", "d", "z"]
    assert sorted(swept_depth(index) for index in range(10)) == pytest.approx([0.05 + 0.1 * i for i in range(10)])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("needle", count_tokens, 1024, 0), "tasks"),
        (("kv_list", count_tokens, 64, 0), "lengths"),
        (("kv_list", count_tokens, 1024, 0, 0, "dev"), "split"),
    ],
)
def test_bad_input_is_named(arguments, field):
    with pytest.raises(SettingError, match=f"^{field}: got"):
        make_sample(*arguments)
    with pytest.raises(SettingError, match="Did you mean needle_noise"):
        find_tasks(["needle_nois"])


@pytest.mark.parametrize("task", ["kv_list", "qa_one_hop", "qa_two_hop"])
def test_a_length_that_the_names_of_a_split_cannot_fill_is_refused(task):
    with pytest.raises(SettingError, match="^lengths: got .* at most about"):
        make_sample(task, count_tokens, 2**17, 0)


def test_references_of_a_data_set_may_be_numbers(tmp_path):
    pytest.importorskip("datasets")
    row = {"context": "a", "question": "q?", "answer_prefix": "", "answers": [12, 34], "task": "count"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = load_hub_samples(str(tmp_path), count_tokens)
    assert sample.references == ("12", "34")
    assert sample.answer == " 12, 34"


def test_where_answers_are_alternatives_one_is_enough(tmp_path):
    pytest.importorskip("datasets")
    row = {"context": "a", "question": "q?", "answer_prefix": "", "answers": ["in Paris", "Paris, France"]}
    rows = [{**row, "task": "qa_1"}, {**row, "task": "niah_multivalue"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    either, both = load_hub_samples(str(tmp_path), count_tokens)
    assert (either.metric, either.answer) == ("any", " in Paris")
    assert (both.metric, both.answer) == ("f1", " in Paris, Paris, France")
    answer = Answer(0.0, 0.0, torch.zeros(2, dtype=torch.bool), 0.0, 0, 0)
    assert score(either, answer, " Paris, France.") == 1.0
    assert score(either, answer, "the Paris") == pytest.approx(2 / 3)  # of two words each time
    assert score(either, answer, "Rome") == 0.0


def test_a_passage_to_be_copied_begins_as_no_other_does():
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"]
    other = ["a", "b", "c", "d", "e", "f", "g", "x", "i", "j", "k", "l", "m", "n"]
    assert beginning(words, [words, other]) == 8
    assert beginning(words, [words, words, other[1:]]) == 6


def test_samples_of_a_data_set_in_kvpress_schema(tmp_path):
    pytest.importorskip("datasets")
    rows = [
        {"context": "a b c", "question": "q?", "answer_prefix": "It is", "answer": ["c"], "task": "niah"},
        {"context": "a b c d", "question": "q2?", "answer_prefix": "", "answer": ["c", "d"], "task": "niah"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load_hub_samples(str(tmp_path), count_tokens)
    assert (first.task, first.index, first.metric, first.answer) == (f"{tmp_path.name}/niah", 0, "exact", " c")
    assert (second.index, second.metric, second.references) == (1, "f1", ("c", "d"))
    with pytest.raises(SettingError, match="^hub: got"):
        load_hub_samples(str(tmp_path / "nowhere" / "at" / "all"), count_tokens)
