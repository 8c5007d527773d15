"""kvpress-moe calibrate: measure how much new prompts lose, so that routers can promise a KL divergence."""

from __future__ import annotations

import json
import time
from itertools import count
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from kvpress_moe.budget.confidence import prompts_needed
from kvpress_moe.cli.options import (
    Device,
    Model,
    Router,
    check_between,
    check_number,
    check_out_directory,
)
from kvpress_moe.cli.progress import timed_bar
from kvpress_moe.codes.precision_names import parse_precision
from kvpress_moe.errors import SettingError

LEAST_ADAPTING = 8

EPILOG = """Examples:

kvpress-moe calibrate --router routers/mine --out routers/mine

kvpress-moe calibrate --texts contracts --out routers/contracts

kvpress-moe calibrate --texts contracts --confidence 0.95 --out routers/contracts

kvpress-moe ask book.txt "Who signed?" --router routers/contracts --precision mixed --max-kl 0.02
"""


def adapting_of(prompts: int) -> int:
    """How many prompts about texts adapt the estimate, by default."""
    return max(LEAST_ADAPTING, prompts // 4)


def calibrate(
    out: Annotated[Path, typer.Option(help="Directory for the routers with the new calibration. May be --router.")],
    router: Router = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Directory of your own texts (.txt, .md, .rst). The model asks questions about them. Default: prompts "
            "of the built-in tasks."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="What can be promised: mixed, none (pairs are evicted or stay), or a menu such as k8v4,k4v2. Several "
            "are separated by ;"
        ),
    ] = "mixed;none",
    prompts: Annotated[int, typer.Option(help="Number of prompts that are measured, with those of --adapt.")] = 100,
    adapt: Annotated[
        int | None,
        typer.Option(
            help="Number of these prompts that the estimate is adapted to; the others calibrate it. Default: 0; with "
            f"--texts a quarter of the prompts, at least {LEAST_ADAPTING}."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="The highest confidence that you will ask for. It tells the least number of prompts.")
    ] = 0.9,
    fit: Annotated[
        int, typer.Option(help="Number of prompts of the built-in tasks that the estimate is fitted to.")
    ] = 144,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the estimate again. Default: only if the routers have none.")
    ] = False,
    length: Annotated[int, typer.Option(help="Tokens of a context.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 1,
    shards: Annotated[
        Path | None, typer.Option(help="Directory for measurements. An interrupted run continues from it.")
    ] = None,
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """
    Calibrate routers, so that `--max-kl` can be promised.

    Each prompt is read once, and its cache is compressed to many sizes. The KL divergence of the answers from the full
    cache's is measured at each size. What is promised holds for prompts like these.
    """
    check_out_directory(out)
    if shards is not None:
        check_out_directory(shards, "shards")
    check_between("confidence", confidence)
    check_number("prompts", prompts, 2, 2000, "A confidence of 0.99 needs 99, and few promises need more than 1000.")
    check_number("fit", fit, 40, remedy="An estimate needs two prompts of each kind.")
    check_number("length", length, 128)
    check_number("seed", seed, 1, 2**63 - 1, remedy="Seed 0 makes the prompts that the estimate is fitted to.")
    needed = prompts_needed(confidence)
    smallest = needed + (adapt or 0)
    if adapt is None and texts is not None:
        smallest = next(n for n in count(needed) if n - adapting_of(n) >= needed)
        adapt = adapting_of(prompts)
    adapt = adapt or 0
    if 0 < adapt < LEAST_ADAPTING or adapt < 0:
        raise SettingError("adapt", adapt, f"0, or at least {LEAST_ADAPTING}", "With 0 the estimate is not adapted.")
    if prompts < smallest:
        also = f"; {smallest - needed} more adapt the estimate" if smallest > needed else ""
        raise SettingError(
            "prompts",
            prompts,
            f"at least {smallest}: {needed} for confidence {confidence}{also}",
            f"For example --prompts {max(100, smallest)}.",
        )
    menus = [parse_precision(None if name.strip() == "none" else name.strip()) for name in precision.split(";")]
    if texts is not None and not texts.is_dir():
        raise SettingError("texts", str(texts), "a directory with texts", "Check the path.")

    started = time.perf_counter()
    with timed_bar() as step:
        step("importing", 0, 1)
        from kvpress_moe.model.context_length import check_length
        from kvpress_moe.model.layers import language_model
        from kvpress_moe.model.loading import load_model
        from kvpress_moe.press.moe_router_press import MoERouterPress
        from kvpress_moe.routers.checkpoint import save_promises
        from kvpress_moe.routers.resolve import directory_of
        from kvpress_moe.training.calibration import calibrate as calibrated
        from kvpress_moe.training.calibration import task_prompts
        from kvpress_moe.training.text_prompts import contexts, read_texts, text_prompts

        read, pieces = None if texts is None else read_texts(texts), []
        step("loading the model", 0, 1)
        loaded, tokenizer = load_model(model, device)
        press = MoERouterPress(router=router)
        press.post_init_from_model(loaded)
        routers = press.routers
        assert routers is not None
        if not routers.config.trained or not routers.config.num_heads:
            raise SettingError(
                "router", router, "trained routers", "Train some for this model: kvpress-moe train --out DIR."
            )
        limit = language_model(loaded).config.max_position_embeddings
        if read is None:
            made = task_prompts(tokenizer, prompts, length, seed, limit)
        else:
            check_length(loaded, length, 64, 64)
            pieces = contexts(read, tokenizer, length, prompts, seed)
            made = text_prompts(loaded, tokenizer, pieces, seed, step)
        adapting = set(Random(f"{seed}/adapting").sample(range(prompts), adapt))
        calibrating = [number for number in range(prompts) if number not in adapting]
        n_texts = len({pieces[number][0] for number in calibrating}) if pieces else 0
        found = calibrated(
            loaded,
            routers,
            menus,
            [made[number] for number in calibrating],
            lambda: task_prompts(tokenizer, fit, length, 0, limit),
            {"prompts": "tasks" if texts is None else f"texts: {texts.name}", "seed": seed, "length": length},
            refit,
            shards,
            step,
            [made[number] for number in sorted(adapting)],
        )
        attention = language_model(loaded).layers[0].self_attn
        save_promises({**routers.promises, **found}, directory_of(router, attention), out)
    summary: dict[str, Any] = {
        "router": str(out),
        "prompts": prompts,
        "adapted_to": adapt,
        **({} if texts is None else {"texts": n_texts}),
        "highest_confidence": round((prompts - adapt) / (prompts - adapt + 1), 4),
        "max_kl": {name: [float(f"{bound:.2g}") for bound in one.bounds] for name, one in found.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    if 0 < n_texts < needed:
        typer.echo(
            f"The pieces that calibrate are of {n_texts} texts only. What is promised holds for more pieces of these "
            f"texts, not for others: for a confidence of {confidence:g} take at least {needed} texts.",
            err=True,
        )
    print(json.dumps(summary, separators=(",", ":")))
