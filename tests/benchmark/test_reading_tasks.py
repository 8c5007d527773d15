"""The tasks beside the first fourteen: the answer follows from the context, and no other one does."""

import json
import re
from random import Random

import pytest

from kvpress_moe.benchmark.tasks import CORE, SPLITS, TASKS, find_tasks, make_sample
from kvpress_moe.benchmark.tasks.cloze import fits
from kvpress_moe.benchmark.tasks.comparing import MEASURES
from kvpress_moe.benchmark.tasks.counting import ROWS, TRAITS
from kvpress_moe.benchmark.tasks.dialogue import PLANS
from kvpress_moe.benchmark.tasks.fact_families import FAMILIES
from kvpress_moe.benchmark.tasks.filling import fill
from kvpress_moe.benchmark.tasks.json_records import flat, nested
from kvpress_moe.benchmark.tasks.vocabulary import cities, firms, many_people, people, streets
from kvpress_moe.benchmark.tasks.wording import article, capitalised
from kvpress_moe.errors import SettingError
from kvpress_moe.training.config import HELD_OUT, TrainingConfig

MORE = tuple(TASKS)[14:]
PERSON = r"[A-Z]\w+ (?:[A-Z]\. )?[A-Z]\w+"


def count_tokens(text):
    """Four characters a token."""
    return -(-len(text) // 4)


def samples(task, n=30, length=700):
    return [make_sample(task, count_tokens, length, index) for index in range(n)]


def found(template, context, **fields):
    """Groups of all places in the context where a statement is made. Fields are patterns."""
    pattern = re.escape(template)
    for name, value in fields.items():
        pattern = pattern.replace(rf"\{{{name}\}}", value)
    return re.findall(rf"(?i:{pattern[0]}){pattern[1:]}" if pattern[0].isalpha() else pattern, context)


def test_the_benchmark_stays_at_its_first_fourteen_tasks():
    assert len(CORE) == 14
    assert find_tasks(None) == CORE == tuple(TASKS)[:14]
    assert find_tasks(["all"]) == tuple(TASKS)
    assert find_tasks(iter(["facts", "copy"])) == ("facts", "copy")
    with pytest.raises(SettingError, match="^tasks: got 'all'"):
        find_tasks(["all", "copy"])
    assert not set(TrainingConfig().tasks) & set(HELD_OUT)
    first, second = "facts facts_two documents table json_records", "dialogue counting comparing cloze steps"
    assert list(MORE) == f"{first} {second}".split()


@pytest.mark.parametrize("task", MORE)
def test_short_contexts_are_filled_and_too_short_ones_refused(task):
    for split in SPLITS:
        for index in range(4):
            assert 0.8 * 256 <= count_tokens(make_sample(task, count_tokens, 256, index, split=split).context) <= 256
    with pytest.raises(SettingError, match="^lengths: got 128"):
        make_sample(task, count_tokens, 128, 0)


@pytest.mark.parametrize("task", MORE)
def test_wording_varies(task):
    made = samples(task, 20)
    assert len({sample.question for sample in made}) == 20
    plain = sum(sample.answer_prefix in ("Answer:", "The answer is", "The correct answer is") for sample in made)
    assert 0 < plain < 20
    assert len({sample.context.split(" ")[0] for sample in made}) > 3
    assert all(sample.answer[0] == " " and len(sample.answer) < 90 for sample in made)


@pytest.mark.parametrize("task", MORE)
def test_the_names_of_other_splits_are_not_used(task):
    for split in SPLITS:
        rest = [other for other in SPLITS if other != split]
        others = {name for other in rest for name in (*people(other), *firms(other), *streets(other))}
        towns = {name for other in rest for name in cities(other)}
        for index in range(8):
            sample = make_sample(task, count_tokens, 1024, index, split=split)
            text = f"{sample.context} {sample.question} {sample.answer}"
            assert not others & set(re.findall(r"(?=\b([A-Z]\w+ [A-Z]\w+)\b)", text))
            assert not towns & set(re.findall(r"\w+", text))


@pytest.mark.parametrize("task", ["facts", "documents", "table", "dialogue", "comparing", "cloze"])
def test_depths_are_swept(task):
    depths = []
    for sample in samples(task, 40, 2048):
        if sample.context.count(sample.references[0]) == 1:
            depths.append(sample.context.index(sample.references[0]) / len(sample.context))
            assert depths[-1] == pytest.approx(sample.depth, abs=0.12)
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_what_is_asked_is_stated():
    for sample in samples("facts") + samples("facts_two"):
        asked = re.sub("^(According to the text above|Based on the text), ", "", sample.question)
        for question, value in zip(re.split(r", and |\?$", asked)[:-1], sample.references, strict=True):
            stated = [
                statement
                for family in FAMILIES
                for template in family.questions
                for subject in re.findall(f"(?i)^{template[:-1].format(s='(.+)')}$", question)
                for statement in family.statements
                if capitalised(statement.format(s=subject, v=value)) in sample.context
            ]
            assert stated, question


def test_a_document_states_the_answer_after_its_title():
    for sample in samples("documents"):
        names = sorted((*people("test"), *firms("test"), *cities("test")), key=len, reverse=True)
        name = next(name for name in names if name in sample.question)
        assert sample.context.index(name) < sample.context.rindex(sample.references[0])


def test_a_row_of_the_table_holds_the_answer():
    for sample in samples("table"):
        rows = [re.split(r",| {2,}| ?\| ?", line.strip("| ")) for line in sample.context.split("\n")]
        (row,) = [row for row in rows if len(row) > 3 and re.search(rf"\b{row[0]}\b", sample.question)]
        assert sample.references[0] in row[1:]
        assert 4 <= len(row) <= 6
        assert len({line[0] for line in rows[2:]}) == len(rows[2:])


def test_a_record_holds_the_answer():
    for sample in samples("json_records"):
        text = sample.context[re.search(r"[\[{]", sample.context).start() :]
        records = json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.split("\n")]
        names = [next(iter(record.values())) for record in records if "author" not in next(iter(record))]
        assert len(set(names)) == len(names)
        (record,) = [record for record in records if next(iter(record.values())) in sample.question]
        assert sample.references[0] in list(flat(record).values())[1:]


def test_nested_and_flat_are_inverses():
    record = {"a": "1", "b.c": "2", "b.d": "3"}
    assert nested(record) == {"a": "1", "b": {"c": "2", "d": "3"}}
    assert flat(nested(record)) == record


def test_only_the_right_speaker_says_so():
    for sample in samples("dialogue", 60):
        said = {}
        for plan in PLANS:
            for statement in plan.statements:
                statement = statement.replace("{a}", "{v}")
                value = r"((?:an? )?\w[\w:' ]*?)"
                for speaker, told in found("{s} {x}" + statement, sample.context, s=r"(\w+)[:>]\**", v=value, x=""):
                    said[plan, speaker] = told
        plan, speaker, value = next(
            (plan, speaker, value)
            for (plan, speaker), value in said.items()
            if plan.question.format(s=speaker).casefold()[1:] in sample.question.casefold()
            or plan.who.format(v=value, a=value).casefold()[1:] in sample.question.casefold()
        )
        asks_who = plan.who.format(v=value, a=value).casefold()[1:] in sample.question.casefold()
        assert sample.answer.strip() == (speaker if asks_who else value)
        assert list(said.values()).count(value) == 1


def test_what_is_counted_is_there_that_often():
    for sample in samples("counting", 60):
        for trait in TRAITS:
            asked = found(f"How many {trait.counted}?", sample.question, v="(.+)")
            if asked:
                value = re.escape(asked[0])
                matching = {
                    name
                    for statement in (*trait.statements, *ROWS)
                    for name in found(statement, sample.context, s=f"({PERSON})", v=value, t=trait.name, n=r"\d+")
                }
                assert len(matching) == int(sample.answer)
                assert 2 <= len(matching) <= 6
                break
        else:
            pytest.fail(sample.question)


def test_what_is_compared_has_these_numbers():
    for sample in samples("comparing", 60):
        choices = [
            (measure, choose, word)
            for measure in MEASURES
            for choose, words in ((max, measure.more), (min, measure.less))
            for word in words
            if re.search(rf"(?i)\b{measure.question.format(how=word)}[:,]", sample.question)
        ]
        ((measure, choose, _),) = choices
        numbers = {}
        for statement in measure.statements:
            for name, number in named(statement, sample.context):
                if name in sample.question:
                    numbers[name] = number
        assert len(numbers) in (2, 3)
        assert len(set(numbers.values())) == len(numbers)
        assert choose(numbers, key=numbers.get) == sample.answer.strip()


def named(statement, context):
    """(Subject, number) of all statements of this wording."""
    subject = rf"((?i:the) \w+ \w+|{PERSON}|[A-Z]\w+)"
    for pair in found(statement, context, s=subject, n=r"(\d+)"):
        name, number = pair if pair[1].isdigit() else pair[::-1]
        yield re.sub("^The ", "the ", name), int(number)


def test_only_the_answer_fits_the_gap():
    for sample in samples("cloze", 60):
        after = "? " if sample.question.startswith("Wh") else ": "
        gapped = sample.question.split(after, 1)[1]
        assert gapped.count("____") == 1
        assert gapped.replace("____", sample.references[0]) in sample.context
        whole = gapped.replace("____", sample.references[0])
        lines = {line.strip() for line in sample.context.split("\n")}
        others = (lines if whole in lines else set(re.split(r"(?<=[.!?:]) ", sample.context))) - {whole}
        assert not any(fits(gapped, piece) for piece in others)
    assert fits("a ____ c", "a b b c")
    assert not fits("a ____ c", "a b")


def test_a_step_is_found_by_its_title_and_number():
    for sample in samples("steps", 60):
        parts = {}
        for line in sample.context.split("\n"):
            numbered = re.match(r"(?:- )?(?:Step )?(\d)[.:)] (.+?)\.?$", line)
            if numbered:
                parts[title].append(numbered[2])
            elif line:
                title = re.sub(r"^(## |How to do it: )", "", line).rstrip(":")
                parts[title] = []
        (title,) = [title for title in parts if title[1:] in sample.question]
        steps = parts[title]
        assert len(set(steps)) == len(steps)
        if number := re.search(r"step (\d) of", sample.question):
            assert steps[int(number[1]) - 1] == sample.answer.strip()
        elif before := re.search(r'right after "(.+)"', sample.question):
            assert steps[steps.index(before[1]) + 1] == sample.answer.strip()
        else:
            assert sum(sample.answer.strip() in step for step in steps) >= 1


def test_filling_may_pass_over_what_does_not_fit():
    assert fill(iter(["aaaa", "a" * 30, "bbbb", "c" * 30, "dddd"]), 20, len, misses=2) == ["aaaa", "bbbb"]


def test_names_get_initials_where_there_are_too_few():
    assert set(many_people(Random(0), "test", 100)) <= set(people("test"))
    many = many_people(Random(0), "test", 2000)
    assert len(set(many)) == 2000
    assert all(re.fullmatch(r"\w+ [A-Z]\. \w+", name) for name in many)
    assert (article("oak"), article("teal sofa")) == ("an oak", "a teal sofa")
