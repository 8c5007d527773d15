"""kvpress-moe explore writes one page, or refuses before any work."""

import json
import re

import pytest
from typer.testing import CliRunner

from kvpress_moe.cli import app
from tests.explore.made import TEXT


def explore(*arguments, stdin=None):
    return CliRunner().invoke(app, ["explore", *arguments], input=stdin)


def data(path):
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="payload" type="application/json">(.*?)</script>', html).group(1))


def test_a_text_becomes_a_page(model_directory, tmp_path):
    out, text = tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ["--model", str(model_directory), "--max-new-tokens", "4", "--out", str(out), "--json"]
    result = explore(str(text), "--question", "What?", "--question", "</script>", "--ratio", "0.75", *common)
    assert result.exit_code == 0, result.output
    figures, payload = json.loads(result.stdout.splitlines()[-1]), data(out)
    assert figures["context_tokens"] == len(payload["tokens"]) == 1 + len(TEXT)
    assert [answer["question"] for answer in payload["answers"]] == ["What?", "</script>"]
    assert payload["budget"] == {"ratio": 0.75, "scope": "uniform", "min_share": 0.2, "min_pairs": 40}
    assert figures["page_mib"] == out.stat().st_size / 2**20
    assert [path.name for path in tmp_path.iterdir()] in (["page.html", "text.txt"], ["text.txt", "page.html"])

    again = explore("-", "--experts", "knorm", "--budget", "layer", *common, stdin="A short text.")
    assert again.exit_code == 0, again.output
    payload = data(out)
    assert (payload["experts"], payload["answers"]) == (["knorm"], [])
    assert payload["budget"]["scope"] == "layer"


def test_wrong_use_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *args: pytest.fail("the model was loaded"))
    out = ["--out", str(tmp_path / "page.html")]
    for arguments, text in (
        ([], "out: got None"),
        (["--out", str(tmp_path)], "out: got"),
        (["--out", str(tmp_path / "no" / "page.html")], "out: got"),
        (["nowhere.txt", *out], "TEXT: got"),
        ([*out, "--ratio", "0"], "ratio: got 0.0"),
        ([*out, "--ratio", "1"], "compression_ratio: got 1.0"),
        ([*out, "--budget", "heads"], "budget: got"),
        ([*out, "--precision", "few"], "precision: got"),
        ([*out, "--experts", "nobody"], "experts: got"),
    ):
        assert re.match(text, str(explore(*arguments).exception))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_long_leaves_no_page(model_directory, tmp_path):
    out = tmp_path / "page.html"
    result = explore("-", "--model", str(model_directory), "--out", str(out), stdin="word " * 2000)
    assert re.match("TEXT: got '10001 tokens', expected at most", str(result.exception))
    assert list(tmp_path.iterdir()) == []
