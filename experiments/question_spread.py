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
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.model.loading import load_model
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.promised_budget import setting_of
from kvpress_moe.routers.promise import FITTED, LEAST
from kvpress_moe.training.calibration import KINDS, measure, tensors
from kvpress_moe.training.text_prompts import text_prompts

SEED = 3  # of texts and questions; fit and calibration have 0 and 1


def texts(tokenizer: Any, length: int, per_kind: int) -> list[str]:
    """Contexts, some of each kind of the calibration."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    kinds = KINDS
    samples = [make_sample(kind, count_tokens, length, n, SEED, "tune") for n in range(per_kind) for kind in kinds]
    return [sample.context for sample in samples]


def asked(model: Any, tokenizer: Any, contexts: Sequence[str], n_questions: int) -> list[Prompt]:
    """Some prompts about each text: text by text."""
    pieces = [("the text", context) for context in contexts for _ in range(n_questions)]
    return text_prompts(model, tokenizer, pieces, SEED)


def spreads(logs: Tensor, errors: Tensor) -> dict[str, float]:
    """Standard deviations of logarithms of KL divergences, and of the estimate's errors, both (texts, questions)."""
    return {
        "median": float(logs.median().exp()),
        "all": float(logs.std()),
        "questions": float(logs.var(1).mean().sqrt()),
        "error": float(errors.square().mean().sqrt()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for measurements and the table")
    parser.add_argument("--questions", type=int, default=4, help="questions about each text, at least 2")
    parser.add_argument("--texts", type=int, default=1, help="texts of each kind")
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.questions < 2 or arguments.texts < 1:
        parser.error("questions: at least 2, so that they can differ; texts: at least 1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model()
    press = MoERouterPress(precision="mixed")
    press.post_init_from_model(model)
    assert press.routers is not None
    promise = press.routers.promises[setting_of(press.menu)]
    contexts = texts(tokenizer, arguments.length, arguments.texts)
    prompts = asked(model, tokenizer, contexts, arguments.questions)
    found = measure(model, prompts, {"mixed": press}, arguments.out / "questions.jsonl", partial(print, flush=True))
    features, lost, divergences = tensors(found["mixed"])
    logs = divergences.clamp(min=LEAST).log()
    errors = logs - promise.estimate.at(features, lost, promise.shares)
    rows: list[dict[str, Any]] = [
        {"share": share, **spreads(*(one[:, number].view(len(contexts), -1) for one in (logs, errors)))}
        for number, share in enumerate(promise.shares.tolist())
    ]
    rows = [row for row in rows if FITTED[0] < row["median"] < FITTED[1]]
    versions = ", ".join(f"{package} {version(package)}" for package in ("kvpress-moe", "torch", "transformers"))
    command = shlex.join(["python", "-m", "experiments.question_spread", *sys.argv[1:]])
    lines = [
        "# What the question decides",
        "",
        f"Command: `{command}`. {len(contexts)} texts of {len(KINDS)} kinds, tune split, seed {SEED}; "
        f"{arguments.questions} questions about each; five of six are written by the model, the others are general "
        f"ones. SmolLM2-135M-Instruct, float32; {versions}.",
        "",
        "Standard deviations of the logarithm of the KL divergence: between all prompts, between the questions of one "
        "text, and the root of the mean squared error of the shipped estimate, which sees the text alone. *Explained*: "
        "share of this mean square that is the questions' variance.",
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
