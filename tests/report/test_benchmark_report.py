"""The report says what the records say: means of task means, intervals, paired differences, nothing left out."""

import gzip
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from kvpress_moe.benchmark.records import COLUMNS
from kvpress_moe.benchmark.results import best_single, load, mean_over_tasks, oracle_values, ranked
from kvpress_moe.errors import SettingError
from kvpress_moe.report.markdown import costs, overview, per_task, skills, versus, versus_best_of_task

GROUPS = {"full": "reference", "random": "baseline", "snapkv": "kvpress", "cur": "kvpress", "<b>moe</b>": "ours"}
TASKS = ("needle_noise", "kv_list", "prose")
RATIOS = (0.5, 0.75, 0.9)


def write_run(directory, split_lines=False, **header):
    """A run of 3 tasks × 5 methods × 3 ratios × 6 samples with numbers from a seed."""
    generator = np.random.default_rng(0)
    directory.mkdir(exist_ok=True)
    about = {
        "format": 1,
        "model": "a/model",
        "fingerprint": {},
        "versions": {"torch": "2"},
        "seed": 0,
        "split": "test",
        "setting": "agnostic",
        "sinks": 4,
        "recent": 16,
        "min_share": 0.2,
        "commands": ["kvpress-moe bench"],
        "methods": {name: {"group": group} for name, group in GROUPS.items()},
    }
    (directory / "run.json").write_text(json.dumps(about | header))
    lines = []
    for task in TASKS:
        for index in range(6):
            results = [["full", 0.0, float(task != "kv_list"), 0.1, 0.0, 1.0, 1000, 8000, 0.0]]
            for number, method in enumerate(list(GROUPS)[1:]):
                for ratio in RATIOS:
                    kl = generator.random() * ratio * (5 - number)
                    kept = round(1000 * (1 - ratio))
                    results.append([method, ratio, 0.5, 0.1 + kl, kl, None, kept, 8 * kept, 0.1])
            record = {"sample": f"{task}/{index}", "task": task, "length": 1024, "index": index, "depth": index / 6}
            record |= {"tokens": 1000, "prefill_s": 2.0, "columns": list(COLUMNS)}
            parts = [results[:5], results[5:]] if split_lines else [results]
            lines += [json.dumps(record | {"results": part}) for part in parts]
    (directory / "records.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def results(tmp_path):
    return load([write_run(tmp_path / "run")])


def naive(directory, method, ratio, column):
    """Mean over tasks of the mean over samples, with plain loops."""
    by_task = {}
    for line in (directory / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        for row in record["results"]:
            if (row[0], row[1]) == (method, ratio):
                by_task.setdefault(record["task"], []).append(row[COLUMNS.index(column)])
    return sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)


def test_every_tasks_best_press_stands_against_ours(results, tmp_path):
    """By hand: per task and ratio the press of lowest KL, and the mean of its samples' KL minus ours."""
    table = versus_best_of_task(results, "<b>moe</b>")
    kl = {}
    for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        for row in record["results"]:
            kl.setdefault((record["task"], row[0], row[1]), []).append(row[4])
    signs = {ratio: [0, 0] for ratio in RATIOS}
    for task, *cells in table.rows[:-1]:
        for ratio, cell in zip(RATIOS, cells, strict=True):
            best = min(("snapkv", "cur"), key=lambda name: np.mean(kl[task, name, ratio]))
            difference = np.mean(np.subtract(kl[task, best, ratio], kl[task, "<b>moe</b>", ratio]))
            assert cell.startswith(f"{best} {difference:+.4f} [")
            if cell.endswith("*"):
                signs[ratio][int(difference < 0)] += 1
    assert sum(map(sum, signs.values())) > 0
    assert table.rows[-1][1:] == [f"{better} / {worse}" for better, worse in signs.values()]


def test_one_sample_tells_no_difference(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [line for line in (run / "records.jsonl").read_text().splitlines() if json.loads(line)["index"] == 0]
    (run / "records.jsonl").write_text("\n".join(lines) + "\n")
    for table in (versus(load([run]), "<b>moe</b>"), versus_best_of_task(load([run]), "<b>moe</b>")):
        assert not any("*" in cell for row in table.rows for cell in row[1:])


def test_means_are_means_of_task_means(results, tmp_path):
    for method in ("snapkv", "<b>moe</b>"):
        for ratio in RATIOS:
            for column in ("kl", "nll", "score"):
                found = mean_over_tasks(results.by_task((method, ratio), column)).mean
                assert found == pytest.approx(naive(tmp_path / "run", method, ratio, column))
    extra = mean_over_tasks(results.by_task(("snapkv", 0.5), "extra")).mean
    assert extra == pytest.approx(naive(tmp_path / "run", "snapkv", 0.5, "nll") - 0.1)
    assert mean_over_tasks(results.by_task(("snapkv", 0.9), "share")).mean == pytest.approx(0.1)
    assert mean_over_tasks(results.by_task(("snapkv", 0.9), "cost")).mean == pytest.approx(0.05)


def test_paired_differences_are_means_of_differences(results):
    pairs = results.paired(("snapkv", 0.5), ("cur", 0.5), "kl")
    expected = [
        np.mean([
            results.values["snapkv", 0.5][sample]["kl"] - results.values["cur", 0.5][sample]["kl"]
            for sample in results.samples
            if results.task_of[sample] == task
        ])
        for task in TASKS
    ]  # fmt: skip
    assert mean_over_tasks(pairs).mean == pytest.approx(np.mean(expected))


def test_intervals_are_seeded_hold_the_mean_and_shrink_with_samples():
    generator = np.random.default_rng(1)
    few, many = ({"a": generator.normal(size=n), "b": generator.normal(size=n)} for n in (10, 1000))
    estimate = mean_over_tasks(few)
    assert estimate == mean_over_tasks(few)
    assert estimate.low < estimate.mean < estimate.high
    wide, narrow = (e.high - e.low for e in (estimate, mean_over_tasks(many)))
    assert narrow < wide / 5
    assert narrow == pytest.approx(2 * 1.96 * (2 / 1000) ** 0.5 / 2, rel=0.15)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        estimate = mean_over_tasks({task: generator.normal(size=30) for task in "ab"}, seed=trial)
        covered += estimate.low < 0 < estimate.high
    assert 180 <= covered <= 198


def test_several_lines_of_a_sample_are_one_and_a_cut_line_is_left_out(results, tmp_path):
    split = write_run(tmp_path / "split", split_lines=True)
    with (split / "records.jsonl").open("a") as file:
        file.write('{"sample": "prose/6", "task"')
    other = load([split])
    assert other.samples == results.samples
    assert {cell: set(values) for cell, values in other.values.items()} == {
        cell: set(values) for cell, values in results.values.items()
    }


def test_gzipped_records_are_read_alike(results, tmp_path):
    path = tmp_path / "run" / "records.jsonl"
    with gzip.open(path.with_suffix(".jsonl.gz"), "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    assert load([tmp_path / "run"]).samples == results.samples


def test_runs_that_cannot_be_compared_are_refused_by_the_field(tmp_path):
    first = write_run(tmp_path / "first")
    for change in ({"seed": 1}, {"model": "b/model"}, {"recent": 0}):
        other = write_run(tmp_path / "other", **change)
        with pytest.raises(SettingError, match=f"^RUN: got .*same {next(iter(change))} as"):
            load([first, other])
    with pytest.raises(SettingError, match="^RUN: got .*run.json"):
        load([tmp_path / "nowhere"])
    with pytest.raises(SettingError, match="format 1"):
        load([write_run(tmp_path / "old", format=0)])
    (first / "records.jsonl").write_text("")
    with pytest.raises(SettingError, match="at least one record of a press"):
        load([first])


def test_the_oracle_takes_each_tasks_best_press(results):
    for task in TASKS:
        best = min(("snapkv", "cur"), key=lambda method: results.by_task((method, 0.75), "kl")[task].mean())
        assert best_single(results, 0.75, task) == best
        assert oracle_values(results, 0.75, "kl")[task].mean() == results.by_task((best, 0.75), "kl")[task].mean()


def test_a_second_oracle_chooses_among_the_members_alone(results):
    results.members = ("cur", "random")
    try:
        row = overview(results, "kl", "", "", ".3f").rows[-1]
        for task in TASKS:
            means = [results.by_task((method, 0.75), "kl")[task].mean() for method in results.members]
            assert oracle_values(results, 0.75, "kl", results.members)[task].mean() == min(means)
        assert row[:2] == ["best of cur, random per task (oracle)", "oracle"]
    finally:
        results.members = ()


def test_nothing_is_left_out(results):
    for table in (overview(results, "kl", "", "", ".3f"), costs(results), per_task(results, "kl", "", ".2f", 0.5)):
        assert {row[0] for row in table.rows} >= set(GROUPS) - {"full"}
    assert [row[0] for row in skills(results).rows] == ["needle_noise", "kv_list †", "prose"]
    assert {row[0] for row in versus(results, "cur").rows} == set(GROUPS) - {"full", "cur"}
    assert ranked(results)[0] == "<b>moe</b>"


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_in_itself_and_takes_names_as_text(results, tmp_path):
    pytest.importorskip("matplotlib")
    from kvpress_moe.report.benchmark_report import write_report

    written = write_report([tmp_path / "run"], tmp_path / "out")
    assert {path.name for path in written} == {
        "report.md", "report.html", "score.png", "kl_by_task.png", "needles.png"
    }  # fmt: skip
    parser = _Cells()
    parser.feed((tmp_path / "out" / "report.html").read_text())
    tags = [tag for tag, _ in parser.tags]
    assert "b" not in tags
    assert "<b>moe</b>" in parser.texts
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    assert len(images) == 3
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not [a for _, a in parser.tags if str(a.get("href", "")).startswith("http")]
    assert "kv_list †" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(SettingError, match="^ours: got"):
        write_report([tmp_path / "run"], tmp_path / "out", ours="nobody")


def test_a_report_of_some_tasks_reads_their_records_alone(tmp_path):
    run = write_run(tmp_path / "run")
    whole, part = load([run]), load([run], ["prose"])
    assert part.tasks == ["prose"]
    for cell in whole.values:
        assert part.by_task(cell, "kl")["prose"].tolist() == whole.by_task(cell, "kl")["prose"].tolist()
    with pytest.raises(SettingError, match="^tasks: got 'verse'"):
        load([run], ["verse"])


def test_a_method_that_has_not_judged_every_sample_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in lines[:4]:
        record["results"] = [row for row in record["results"] if row[0] != "cur"]
    (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    names = [row[0] for row in overview(load([run]), "kl", "", "", ".3f").rows]
    assert "cur (14 of 18 samples)" in names
    assert "snapkv" in names
