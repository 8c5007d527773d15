"""kvpress-moe train: train routers for a model by distillation."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress_moe.cli.options import Device, Model, check_number, check_out_directory, split_names
from kvpress_moe.cli.progress import timed_bar

EPILOG = """Examples:

kvpress-moe train --out routers/smollm2

kvpress-moe train --out routers/mine --model my/model --samples 200 --length 2048

accelerate launch --multi_gpu --module kvpress_moe train --out routers/big --model my/model --device cuda --shards /disk

kvpress-moe ask --router routers/smollm2
"""


def train(
    out: Annotated[Path, typer.Option(help="Directory for the trained routers. Routers in it are replaced.")],
    model: Model = None,
    device: Device = "cpu",
    experts: Annotated[
        str | None, typer.Option(help="Names, separated by commas. 'learned' is a part of the router.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token (all).")] = None,
    samples: Annotated[int | None, typer.Option(help="Training prompts of the tasks (54).")] = None,
    study: Annotated[
        int | None, typer.Option(help="Training prompts that the model makes itself: texts, questions, answers (42).")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Longest context, in tokens (1024).")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Kinds of prompts, or all. Default: those that are not held out.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Whose attention is learned: replay (a repetition of the prompt), answer, or both (both)."),
    ] = None,
    value_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of what a value writes, beside attention. 0: attention alone; 1: the product of both (0.5)."
        ),
    ] = None,
    gate: Annotated[bool, typer.Option(help="--no-gate: equal weights for all tokens, a static mixture.")] = True,
    learned_sees: Annotated[
        bool, typer.Option(help="--no-learned-sees: 'learned' sees only the hidden state, not the ranks.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(help="Passes over the captured tokens (8).")] = None,
    aux_loss_weight: Annotated[float | None, typer.Option(help="Weight of the load-balancing loss (0.01).")] = None,
    budget_weight: Annotated[
        float | None, typer.Option(help="Weight of the loss at the budgets' thresholds (2).")
    ] = None,
    end_to_end: Annotated[
        int | None, typer.Option(help="Epochs of end-to-end tuning by the model's answers (3); 0: no tuning.")
    ] = None,
    replay_weight: Annotated[
        float | None, typer.Option(help="Weight of repetitions in end-to-end tuning (1); answers have weight 1.")
    ] = None,
    coded_share: Annotated[
        float | None,
        typer.Option(help="Share of the prompts whose budget counts bytes in that tuning (0.5); others evict only."),
    ] = None,
    long_samples: Annotated[
        int | None,
        typer.Option(
            help="Prompts of up to three times the length, for the decay of scores with distance (18); 0: none."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of prompts and training (0).")] = None,
    shards: Annotated[
        Path | None,
        typer.Option(help="Directory for captured prompts and fitted layers. An interrupted run continues from it."),
    ] = None,
) -> None:
    """
    Train routers for a frozen model. Values in brackets are the defaults.

    The model prefills prompts, and the scores of all experts are recorded. The router of each layer is fitted to the
    attention that later tokens pay. Then the routers of all layers are tuned together, by the model's answers.
    """
    check_out_directory(out)
    if shards is not None:
        check_out_directory(shards, "shards")
    least = {"top_k": top_k, "samples": samples, "epochs": epochs}
    for field, value in least.items():
        check_number(field, value, 1)
    check_number("length", length, 256)
    check_number("seed", seed, 0, 2**63 - 1)
    check_number("end_to_end", end_to_end, 0)
    check_number("study", study, 0)
    check_number("long_samples", long_samples, 0)
    check_number("coded_share", coded_share, 0, 1)
    check_number("value_weight", value_weight, 0, 1)
    weights = {"aux_loss_weight": aux_loss_weight, "budget_weight": budget_weight, "replay_weight": replay_weight}
    for field, weight in weights.items():
        check_number(field, weight, 0, 1e300)

    from dataclasses import replace

    from rich.console import Console

    from kvpress_moe.training.config import TrainingConfig

    given: dict[str, Any] = {
        "experts": split_names("experts", experts),
        "top_k": top_k,
        "samples": samples,
        "study": study,
        "length": length,
        "tasks": split_names("tasks", tasks),
        "teacher": teacher,
        "value_weight": value_weight,
        "gate": gate,
        "learned_sees": learned_sees,
        "epochs": epochs,
        "aux_loss_weight": aux_loss_weight,
        "budget_weight": budget_weight,
        "end_to_end": end_to_end,
        "replay_weight": replay_weight,
        "coded_share": coded_share,
        "long_samples": long_samples,
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
        return  # only the first process saves and prints
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    metrics["command"] = shlex.join(["kvpress-moe", *sys.argv[1:]])
    save_routers(routers, out, metrics, dtype=torch.float16)
    Console().print(f"Use them: MoERouterPress(router={str(out)!r})", markup=False, highlight=False)
    mean_loss = sum(metrics["loss_by_layer"]) / len(metrics["loss_by_layer"])
    summary = {"router": str(out), "prompts": metrics["prompts"], "loss": round(mean_loss, 4)}
    if config.end_to_end:
        summary["divergence"] = metrics["end_to_end"][-1]["answer"]
    print(json.dumps({**summary, "seconds": metrics["seconds"]}, separators=(",", ":")))
