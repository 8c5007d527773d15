"""kvpress-moe train: routers for a model, by distillation."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.options import Device, Model
from kvpress_moe.cli.progress import timed_bar

EPILOG = """Examples:

kvpress-moe train --out routers/smollm2

kvpress-moe train --out routers/mine --model my/model --samples 200 --length 2048

accelerate launch --multi_gpu --module kvpress_moe train --out routers/big --model my/model --device cuda --shards /disk

kvpress-moe ask --router routers/smollm2
"""


def train(
    out: Annotated[Path, typer.Option(help="Directory of the trained routers; those in it are replaced.")],
    model: Model = None,
    device: Device = "cpu",
    experts: Annotated[
        str | None, typer.Option(help="Names separated by commas; 'learned' is the router's own.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token (all).")] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts to learn from (48).")] = None,
    length: Annotated[int | None, typer.Option(help="Longest context, in tokens (1024).")] = None,
    tasks: Annotated[str | None, typer.Option(help="Kinds of prompts; all but variable_tracking and code.")] = None,
    teacher: Annotated[str | None, typer.Option(help="replay, answer or both (both).")] = None,
    value_weight: Annotated[
        float | None,
        typer.Option(help="How much it counts what a value writes: 0 attention alone, 1 the product (0.5)."),
    ] = None,
    gate: Annotated[bool, typer.Option(help="--no-gate: equal weights for all tokens, a static mixture.")] = True,
    learned_sees: Annotated[
        bool, typer.Option(help="--no-learned-sees: the learned expert reads the hidden state alone.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(help="Passes over the captured tokens (8).")] = None,
    aux_loss_weight: Annotated[float | None, typer.Option(help="Of the load-balancing loss (0.01).")] = None,
    budget_weight: Annotated[float | None, typer.Option(help="Of the loss at the budgets' thresholds (2).")] = None,
    end_to_end: Annotated[
        int | None, typer.Option(help="Epochs of tuning by the model's answers, all layers together (3); 0: none.")
    ] = None,
    replay_weight: Annotated[
        float | None, typer.Option(help="Of repeating the context, beside the answers, while tuning (1).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts and fit (0).")] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Keep captured prompts here; a run that was interrupted goes on from them.")
    ] = None,
) -> None:
    """
    Train routers for a frozen model: read prompts, record what each expert thinks, fit to what a repetition attends to.
    """
    from dataclasses import replace

    from rich.console import Console

    from kvpress_moe.cli.options import split_names
    from kvpress_moe.training.config import TrainingConfig

    given: dict[str, Any] = {
        "experts": split_names(experts),
        "top_k": top_k,
        "samples": samples,
        "length": length,
        "tasks": split_names(tasks),
        "teacher": teacher,
        "value_weight": value_weight,
        "gate": gate,
        "learned_sees": learned_sees,
        "epochs": epochs,
        "aux_loss_weight": aux_loss_weight,
        "budget_weight": budget_weight,
        "end_to_end": end_to_end,
        "replay_weight": replay_weight,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if "experts" in given and top_k is None:
        given["top_k"] = len(given["experts"])
    config = replace(TrainingConfig(), **given)
    config.check()

    import torch

    from kvpress_moe.model.loading import load_model
    from kvpress_moe.routers.checkpoint import save_routers
    from kvpress_moe.training import trainer
    from kvpress_moe.training.distributed import launched

    start = time.perf_counter()
    processes = launched(device)
    loaded, tokenizer = load_model(model, processes.device if processes else device)
    with timed_bar() as progress:
        routers, metrics = trainer.train(loaded, tokenizer, config, shards, progress, processes)
    if processes and processes.rank:
        return  # the first process speaks for all
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    metrics["command"] = shlex.join(["kvpress-moe", *sys.argv[1:]])
    save_routers(routers, out, metrics, dtype=torch.float16)
    Console().print(f"Use them: MoERouterPress(router={str(out)!r})", markup=False, highlight=False)
    mean_loss = sum(metrics["loss_by_layer"]) / len(metrics["loss_by_layer"])
    summary = {"router": str(out), "prompts": metrics["prompts"], "loss": round(mean_loss, 4)}
    if config.end_to_end:
        summary["divergence"] = metrics["end_to_end"][-1]["answer"]
    print(json.dumps({**summary, "seconds": metrics["seconds"]}, separators=(",", ":")))
