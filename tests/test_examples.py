"""The examples run, and stay short."""

import runpy
from pathlib import Path

import pytest

from tests.report.test_benchmark_report import write_run

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_has_at_most_sixty_lines(path, model_directory, capsys):
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path))["main"](str(model_directory))
    assert "layer" in capsys.readouterr().out


def test_there_are_examples():
    assert {"moe_router_example.py", "custom_expert.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.filterwarnings("ignore:MoERouterPress. the routers are untrained")
def test_the_pictures_of_the_documentation_can_be_drawn_again(model_directory, tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parent.parent / "docs" / "pictures.py"
    run = write_run(tmp_path / "run")
    runpy.run_path(str(script))["main"](str(model_directory), tmp_path / "out", run, None)
    committed = {path.name for path in (script.parent / "pictures").glob("*.png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == committed
