"""
Distance decay for routers that were trained without it: tune it, and save the routers with it.

    python -m experiments.distance_decay runs/routers/mine --out routers/mine --shards runs/shards
    python -m experiments.distance_decay kvpress_moe/data/routers/smollm2-135m-instruct --out routers/with --samples 36

The other weights do not change. `kvpress-moe train` does this after its tuning, with the same prompts. A promise of the
routers stays if its longest prompt has no pair whose score decays; the others are left out. About ten minutes for 36
prompts of SmolLM2 on two cores. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kvpress_moe import load_model
from kvpress_moe.cli.progress import timed_bar
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import CONFIG, load_routers, save_routers, weights_hash
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.distance_decay import tune_decays
from kvpress_moe.training.shards import Shards
from kvpress_moe.training.trainer import long_prompts, max_tokens


def with_decays(routers: Routers, reach: int) -> Routers:
    """The same routers, with decays of 0."""
    new = Routers(replace(routers.config, reach=reach), routers.fingerprint)
    zeros = {name: weight for name, weight in new.state_dict().items() if name.endswith("calibration.decay")}
    new.load_state_dict({**routers.state_dict(), **zeros})
    new.key_transforms = routers.key_transforms
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router", type=Path, help="directory of the routers")
    parser.add_argument("--out", type=Path, required=True, help="directory for the routers with decays")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=TrainingConfig().long_samples)
    parser.add_argument("--shards", type=Path, help="directory where an interrupted run continues")
    arguments = parser.parse_args()
    routers = load_routers(arguments.router)
    metrics = json.loads((arguments.router / CONFIG).read_text())["metrics"]
    if "recipe" not in metrics or not routers.config.num_heads:
        parser.error(f"{arguments.router}: expected routers that `kvpress-moe train` made")
    if arguments.samples < 1:
        parser.error("--samples: expected at least 1")
    recipe = {name: tuple(value) if isinstance(value, list) else value for name, value in metrics["recipe"].items()}
    coded_share = recipe.get("coded_share", 0.0) if routers.config.strategies else 0.0
    config = TrainingConfig(**{**recipe, "coded_share": coded_share, "long_samples": arguments.samples})
    if not config.end_to_end:
        parser.error(f"{arguments.router}: these routers were not tuned end to end")
    model, tokenizer = load_model(arguments.model)
    reach = config.reach(max_tokens(model))
    if not reach:
        parser.error(f"the model reads {max_tokens(model)} tokens, expected at least {5 * config.length // 2}")
    started = time.perf_counter()
    decaying = with_decays(routers, reach)
    made = long_prompts(config, tokenizer, max_tokens(model))
    with tempfile.TemporaryDirectory() as temporary, timed_bar() as progress:
        shards = Shards((arguments.shards or Path(temporary)) / "long")
        captured = shards.claim(model_fingerprint(model), config.heuristics or ("knorm",), config.seed)
        told = {"routers": weights_hash(routers), "recipe": asdict(config)}
        metrics["decay"] = tune_decays(model, tokenizer, decaying, config, shards, made, captured, told, progress)
    metrics["recipe"]["long_samples"] = arguments.samples
    decaying.promises = {
        name: replace(promise, about={**promise.about, "routers": weights_hash(decaying)})
        for name, promise in routers.promises.items()
        if promise.lengths[1] <= reach
    }
    save_routers(decaying, arguments.out, metrics, dtype=torch.float16)
    decays = torch.stack([layer.calibration.decay.detach() for layer in decaying.layers])
    found = {"routers": str(arguments.out), "reach": reach, "prompts": len(made), "promises": list(decaying.promises)}
    found |= {"mean": round(decays.mean().item(), 3), "std": round(decays.std().item(), 3)}
    found["epochs"] = metrics["decay"]
    print(json.dumps({**found, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
