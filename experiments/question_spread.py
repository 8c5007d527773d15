"""
How much of the KL divergence depends on the question? It bounds what an estimate can know that sees the text alone.

Each text is read once for each of several questions, which the model writes about passages of it, and answers from the
full cache. The KL divergences are measured at all shares of the calibration. The spread between the questions of a text
is then compared with the error of the estimate that ships with the routers. An interrupted run continues.

    python -m experiments.question_spread --out results/promise
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.model.loading import load_model
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.promised_budget import setting_of
from kvpress_moe.routers.promise import FITTED, LEAST
from kvpress_moe.training.calibration import measure, tensors
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.text_prompts import text_prompts

SEED = 3  # of texts and questions; fit and calibration have 0 and 1


def texts(tokenizer: Any, length: int, per_kind: int) -> list[tuple[str, str]]:
    """Names and contexts, some of each kind of the calibration."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    kinds = TrainingConfig().tasks
    samples = [make_sample(kind, count_tokens, length, n, SEED, "tune") for n in range(per_kind) for kind in kinds]
    return [(f"{sample.task}-{sample.index}", sample.context) for sample in samples]


def spreads(logs: Tensor, errors: Tensor, n_texts: int) -> dict[str, float]:
    """Standard deviations of logarithms of KL divergences (questions · texts,), text by text within a question."""
    of_text = logs.view(-1, n_texts)
    return {
        "median": float(logs.median().exp()),
        "all": float(logs.std()),
        "questions": float(of_text.var(0).mean().sqrt()),
        "error": float(errors.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for measurements and the table")
    parser.add_argument("--questions", type=int, default=4, help="questions about each text")
    parser.add_argument("--texts", type=int, default=1, help="texts of each kind")
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model()
    press = MoERouterPress(precision="mixed")
    press.post_init_from_model(model)
    assert press.routers is not None
    promise = press.routers.promises[setting_of(press.menu)]
    pieces = texts(tokenizer, arguments.length, arguments.texts)
    prompts = text_prompts(model, tokenizer, pieces * arguments.questions, SEED)
    found = measure(model, prompts, {"mixed": press}, arguments.out / "questions.jsonl", partial(print, flush=True))
    features, lost, divergences = tensors(found["mixed"])
    logs = divergences.clamp(min=LEAST).log()
    errors = logs - promise.estimate.at(features, lost, promise.shares)
    rows: list[dict[str, Any]] = [
        {"share": share, **spreads(logs[:, number], errors[:, number], len(pieces))}
        for number, share in enumerate(promise.shares.tolist())
    ]
    rows = [row for row in rows if FITTED[0] < row["median"] < FITTED[1]]
    versions = ", ".join(f"{package} {version(package)}" for package in ("kvpress-moe", "torch", "transformers"))
    command = shlex.join(["python", "-m", "experiments.question_spread", *sys.argv[1:]])
    lines = [
        "# What the question decides",
        "",
        f"Command: `{command}`. {len(pieces)} texts of {len(TrainingConfig().tasks)} kinds, tune split, seed {SEED}; "
        f"{arguments.questions} questions about each, written by the model; SmolLM2-135M-Instruct, float32; {versions}",
        "",
        "Standard deviations of the logarithm of the KL divergence: between all prompts, between the questions of one "
        "text, and of the shipped estimate's error, which sees the text alone. *Explained*: share of the error's "
        "variance that is the questions' variance.",
        "",
        "| share of the bytes | median KL | all prompts | questions of one text | error of the estimate | explained |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        explained = (row["questions"] / row["error"]) ** 2
        cells = [f"{100 * row['share']:g} %", f"{row['median']:.2g}"]
        cells += [f"{row[name]:.2f}" for name in ("all", "questions", "error")]
        lines.append("| " + " | ".join([*cells, f"{100 * explained:.0f} %"]) + " |")
    (arguments.out / "questions.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
