"""
What does ``calibrate --texts`` give for texts of one's own, about which the model writes the questions?

Calibration prompts have texts of the tune split, test prompts those of the test split. Five estimates are compared:
the shipped one; the shipped one adapted to a quarter of the calibration prompts, as ``calibrate --texts`` does it; the
same without what the features say; one fitted to that quarter alone; and the same share for all prompts. Margins are
those of the calibration prompts to which the estimate was not adapted. For each bound: the share of the test prompts
that stay within it, and the mean share of the bytes that they keep. An interrupted run continues.

    python -m experiments.promise_for_texts --out results/promise
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from experiments.promise import divergence_at
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.model.loading import load_model
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.promised_budget import setting_of
from kvpress_moe.routers.promise import FITTED, LEAST, Estimate, Promise, share_at
from kvpress_moe.training.calibration import KINDS, Measurement, measure, tensors
from kvpress_moe.training.text_prompts import text_prompts

BOUNDS = (0.005, 0.02, 0.1)
SAME = "same share for all"
SEED = 4  # of texts and questions; fit and calibration of the shipped routers have 0 and 1


def pieces(tokenizer: Any, split: str, length: int, per_kind: int) -> list[tuple[str, str]]:
    """Contexts, some of each kind of the calibration, under one name."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    kinds = KINDS
    samples = [make_sample(kind, count_tokens, length, n, SEED, split) for n in range(per_kind) for kind in kinds]
    return [("the text", sample.context) for sample in samples]


def promises(
    shipped: Promise, adapting: Sequence[Measurement], calibrating: Sequence[Measurement]
) -> dict[str, Promise]:
    """A promise for each estimate. Estimates that are not adapted are calibrated with all prompts."""
    estimate, shares = shipped.estimate, shipped.shares
    nothing = torch.zeros_like(estimate.weights)
    own = tensors(adapting)
    adapted = {
        "shipped, adapted": estimate.adapted(*own, shares),
        "loss curve alone, adapted": replace(estimate, weights=nothing).adapted(*own, shares),
        "fitted to the quarter": Estimate.fit(*own, shares),
    }
    others = {
        "shipped": estimate,
        SAME: replace(estimate, weights=nothing, slopes=torch.tensor([0.0, 1.0]).double()),
    }
    return {
        name: Promise.of(one, *tensors([*adapting, *calibrating] if name in others else calibrating), shares, {})
        for name, one in {**others, **adapted}.items()
    }


def error(estimate: Estimate, measured: Sequence[Measurement], shares: Tensor) -> float:
    """Root of the mean squared error of an estimate, of the divergences in the range that estimates are fitted to."""
    features, lost, divergences = tensors(measured)
    logs = divergences.clamp(min=LEAST).log()
    within = (divergences > FITTED[0]) & (divergences < FITTED[1])
    return float((logs - estimate.at(features, lost, shares))[within].square().mean().sqrt())


def compared(promise: Promise, measured: Sequence[Measurement], bound: float, confidence: float) -> dict[str, float]:
    """How many prompts stay within the bound, and what they keep. None of them gets the caution for unlike prompts."""
    features, lost, divergences = tensors(measured)
    margin = math.log(bound) - promise.margin(bound, confidence)
    estimates = promise.estimate.at(features, lost, promise.shares)
    given = torch.tensor([share_at(row, promise.shares, margin) for row in estimates], dtype=torch.float64)
    reached = divergence_at(divergences.clamp(min=LEAST).log(), promise.shares, given)
    return {"coverage": float((reached <= bound * 1.001).double().mean()), "share": float(given.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for measurements and the table")
    parser.add_argument("--calibration", type=int, default=5, help="calibration prompts of each kind of text")
    parser.add_argument("--test", type=int, default=4, help="test prompts of each kind of text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--confidence", type=float, default=0.9)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model()
    press = MoERouterPress(precision="mixed")
    press.post_init_from_model(model)
    assert press.routers is not None
    shipped = press.routers.promises[setting_of(press.menu)]
    found = {}
    for split, n in (("tune", arguments.calibration), ("test", arguments.test)):
        prompts = text_prompts(model, tokenizer, pieces(tokenizer, split, arguments.length, n), SEED)
        store = arguments.out / f"texts_{split}.jsonl"
        found[split] = measure(model, prompts, {"mixed": press}, store, partial(print, split, flush=True))["mixed"]
    order = Random(SEED).sample(found["tune"], len(found["tune"]))
    adapting, calibrating = order[: len(order) // 4], order[len(order) // 4 :]
    rows = []
    for name, promise in promises(shipped, adapting, calibrating).items():
        of_bound = {bound: compared(promise, found["test"], bound, arguments.confidence) for bound in BOUNDS}
        of_estimate = error(promise.estimate, found["test"], promise.shares)
        rows.append({"estimate": name, "prompts": promise.n_prompts, "error": of_estimate, **of_bound})
    versions = ", ".join(f"{package} {version(package)}" for package in ("kvpress-moe", "torch", "transformers"))
    command = shlex.join(["python", "-m", "experiments.promise_for_texts", *sys.argv[1:]])
    head = [f"{bound:g}: {what}" for bound in BOUNDS for what in ("within", "bytes")]
    lines = [
        "# Promises for texts of one's own",
        "",
        f"Command: `{command}`. {len(found['tune'])} calibration prompts (tune split), of which {len(adapting)} adapt "
        f"the estimate, and {len(found['test'])} test prompts (test split); texts of {len(KINDS)} "
        "kinds; the model writes five of six questions, the others are general ones. SmolLM2-135M-Instruct, "
        f'`precision="mixed"`, confidence {arguments.confidence:g}, seed {SEED}, float32; {versions}.',
        "",
        "*Within*: share of the test prompts whose KL divergence is at most `max_kl`. *Bytes*: mean share of a 16-bit "
        "cache that they keep. *Error*: root of the mean squared error of the logarithm. The caution for prompts that "
        "are unlike the calibration is left out.",
        "",
        "| estimate | margins from | error | " + " | ".join(head) + " |",
        "|" + "---|" * (len(head) + 3),
    ]
    for row in rows:
        told = "" if row["estimate"] == SAME else f"{row['error']:.2f}"  # it says nothing of the divergence
        cells = [f"{100 * row[bound][what]:.1f} %" for bound in BOUNDS for what in ("coverage", "share")]
        lines.append("| " + " | ".join([row["estimate"], f"{row['prompts']} prompts", told, *cells]) + " |")
    (arguments.out / "texts.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "texts.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
