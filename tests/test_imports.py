"""The package's imports run downwards only, from wing to wing, and no files import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvpress_moe"

#: From top to bottom: a wing imports wings that stand below it, never above.
WINGS = (
    "cli",
    "report",
    "training",
    "explore",
    "serve",
    "benchmark",
    "press",
    "experts",
    "routers",
    "cache",
    "codes",
    "model",
    "budget",
)
FACES = {"__init__", "__main__", "auto", "plots"}  # they hand names of all wings on
GROUND = {"errors", "files"}  # modules that every wing may import


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's ``__init__`` by the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, inside functions, for type checkers alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("kvpress_moe.") for name in names if name.startswith("kvpress_moe.")}
    return inside & known


def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imported(path, set(paths)) - {name} for name, path in paths.items()}


def height(name: str) -> int:
    """Of a module's wing: 0 on the ground, higher wings have larger numbers."""
    wing = name.partition(".")[0]
    if name in FACES:
        return len(WINGS) + 1
    return 0 if name in GROUND else len(WINGS) - WINGS.index(wing)


def upward(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} -> {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if height(other) > height(name)
    ]


def test_a_wing_imports_wings_below_it_alone():
    assert upward(graph()) == []


def test_no_files_import_each_other_in_a_circle():
    imports = graph()
    # a folder's __init__ hands names of its files on; who imports the folder imports those files
    TopologicalSorter(imports).prepare()


def test_an_upward_import_and_a_circle_would_be_seen(tmp_path):
    path = tmp_path / "layers.py"
    path.write_text("def late():\n    from kvpress_moe.press.settings import CHECKS\n")
    seen = imported(path, set(modules()))
    assert seen == {"press.settings"}
    assert upward({"model.layers": seen}) == ["model.layers -> press.settings"]
    with pytest.raises(CycleError):
        TopologicalSorter({"cache.a": {"cache.b"}, "cache.b": {"cache.a"}}).prepare()


def test_every_folder_is_a_wing():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(WINGS)
