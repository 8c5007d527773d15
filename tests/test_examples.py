"""The examples run, and stay short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_has_at_most_sixty_lines(path, model_directory, capsys):
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path))["main"](str(model_directory))
    assert "layer" in capsys.readouterr().out


def test_there_are_examples():
    assert {"moe_router_example.py", "custom_expert.py"} <= {path.name for path in EXAMPLES}
