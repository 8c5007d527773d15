"""
Give damaged and forged files to every loader, and print what happened.

python -m fuzz                                   136,000 inputs over all loaders
python -m fuzz --inputs 6000 --loaders routers   some

Half of the inputs are random, from a seed. Atheris steers the other half towards code that was not reached before
(``pip install atheris``; without it all inputs are random). Every pair of loader and driver has its own process.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("routers", "caches", "records", "resumed runs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=136_000, help="number of inputs for all loaders together")
    parser.add_argument("--loaders", default=",".join(NAMES), help="names separated by commas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("LOADER", "DRIVER", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        loader, driver, directory = arguments.child
        feed(loader, driver, Path(directory), arguments.inputs, arguments.seed)
        return 0
    loaders = arguments.loaders.split(",")
    drivers = ("random", "atheris") if importlib.util.find_spec("atheris") else ("random",)
    inputs = arguments.inputs // len(loaders) // len(drivers)
    print("| loader | steered by | inputs | taken | refused | faults | slowest, s | most memory, MiB | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    found = [of_one(loader, driver, inputs, arguments.seed) for loader in loaders for driver in drivers]
    total = {key: sum(one[key] for one in found) for key in ("inputs", "taken", "refused", "seconds")}
    total |= {key: max(one[key] for one in found) for key in ("slowest", "extra")}
    total["faults"] = [fault for one in found for fault in one["faults"]]
    print(row("all", "both" if len(drivers) > 1 else drivers[0], total))
    for fault in total["faults"]:
        print(f"\n{fault}", file=sys.stderr)
    return 1 if total["faults"] else 0


def of_one(loader: str, driver: str, inputs: int, seed: int) -> dict[str, Any]:
    """Test one loader in its own process. If the process dies, this is a fault too."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        options = ["--inputs", str(inputs), "--seed", str(seed), "--child", loader, driver, directory]
        command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", "fuzz", *options]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        out = Path(directory) / "found.json"
        found = json.loads(out.read_text()) if out.exists() else copy.deepcopy(EMPTY)
    if found["inputs"] < inputs:
        said = f"died after {found['inputs']} inputs or more (status {ran.returncode}): {ran.stderr[-2000:]}"
        found["faults"].append(f"{loader}, {driver}: {said}")
    print(row(loader, driver, found), flush=True)
    return found


EMPTY: dict[str, Any] = {"inputs": 0, "taken": 0, "refused": 0, "faults": [], "slowest": 0.0, "extra": 0, "seconds": 0}


def row(loader: str, driver: str, found: dict[str, Any]) -> str:
    counts = (f"{found[key]:,}" for key in ("inputs", "taken", "refused"))
    figures = (str(len(found["faults"])), f"{found['slowest']:.2f}", f"{found['extra'] / 2**20:.1f}")
    seconds = f"{found['seconds']:.0f}"
    return f"| {' | '.join((loader, driver, *counts, *figures, seconds))} |"


def feed(loader: str, driver: str, directory: Path, inputs: int, seed: int) -> None:
    """Test one loader in this process. Results are written to a file every 500 inputs."""
    if driver == "atheris":
        import atheris

        with atheris.instrument_imports(include=["kvpress_moe"]):
            import fuzz.trial
    import torch

    import fuzz.trial
    from fuzz.targets import TARGETS

    torch.set_num_threads(1)
    start = time.perf_counter()
    found = copy.deepcopy(EMPTY)
    out = directory / "found.json"
    target = next(target for target in TARGETS if target.name == loader)(directory / "around" / "input")

    def one(data: bytes) -> None:
        if found["inputs"] >= inputs:  # libFuzzer adds a few inputs of its own
            return
        found["inputs"] += 1
        try:
            outcome = fuzz.trial.try_one(target, data)
            found["taken" if outcome.taken else "refused"] += 1
            found["slowest"] = max(found["slowest"], outcome.seconds)
            found["extra"] = max(found["extra"], outcome.extra or 0)
        except fuzz.trial.Fault as fault:
            if len(found["faults"]) < 20:
                found["faults"].append(f"{fault} (input {data.hex()})")
        if found["inputs"] % 500 == 0 or found["inputs"] == inputs:
            out.write_text(json.dumps(found | {"seconds": time.perf_counter() - start}))

    if driver == "random":
        generator = random.Random(seed)
        for _ in range(inputs):
            one(generator.randbytes(generator.choice((8, 32, 64))))
    else:
        flags = (f"-runs={inputs + 100}", "-max_len=64", "-len_control=0", "-rss_limit_mb=0", "-timeout=60")
        atheris.Setup([sys.argv[0], *flags, f"-seed={seed}", f"-artifact_prefix={directory}/"], one)
        atheris.Fuzz()  # does not return


if __name__ == "__main__":
    sys.exit(main())
