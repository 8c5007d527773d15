"""What can be imported, and what importing costs."""

import json
import subprocess
import sys

import pytest

import kvpress_moe


def test_all_names_are_sorted_and_can_be_had():
    assert kvpress_moe.__all__ == sorted(kvpress_moe.__all__)
    for name in kvpress_moe.__all__:
        assert getattr(kvpress_moe, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = kvpress_moe.Nothing


def test_help_imports_neither_torch_nor_transformers():
    """What makes --help answer within a second."""
    program = """
import sys, json
sys.argv = ["kvpress-moe", "ask", "--help"]
from kvpress_moe.cli import main
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    modules = set(json.loads(run.stdout.splitlines()[-1]))
    assert "--ratio" in run.stdout
    assert not modules & {"torch", "transformers", "kvpress", "numpy", "pandas", "huggingface_hub"}
