"""
Kill training and benchmark runs (SIGKILL) at random moments. They must continue and end like an undisturbed run.

    python -m experiments.kill_runs                      20 runs of each command, each killed twice
    python -m experiments.kill_runs --runs 40 --seed 1

The model is tiny and has random weights. The kills cover the whole run: the first kill of the n-th run is at a random
moment in the n-th part of the undisturbed run's time. The second kill is at any moment (it is too late if little work
was left). Every command runs in a process that is forked from one with all imports done. This only saves seconds per
start. The trained routers must be the same to the byte, and their card except for times. The records of the benchmark
must be the same line by line, except for times. Prints a table; the last line is one JSON document. The exit status is
1 if a run ended with another result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: sums in another order would give other routers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TRAIN = "train --samples 20 --study 0 --length 512 --tasks kv_list,prose --experts learned,keydiff,cur --epochs 12"
NEEDED = (
    "kvpress_moe.benchmark.multi_pass",
    "kvpress_moe.benchmark.runner",
    "kvpress_moe.benchmark.metrics",
    "kvpress_moe.cli",
    "kvpress_moe.model.loading",
    "kvpress_moe.training.trainer",
    "tests.tiny",
    "transformers.models.llama.modeling_llama",
    "rich.progress",
)
BENCH = "bench --limit 12 --lengths 400 --tasks kv_list,needle_noise --methods knorm,snapkv,moe_guide --ratios 0.5,0.9"


def start(work: Callable[[], Any]) -> int:
    """Do some work in a forked process without output. Returns the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        status = 0
    finally:
        os._exit(status)


def wait(child: int) -> bool:
    """Wait for a process. Returns whether it ended without an error."""
    return os.waitpid(child, 0)[1] == 0


def command(arguments: list[str]) -> Callable[[], None]:
    """A function that runs `kvpress-moe` with these arguments."""

    def run() -> None:
        from kvpress_moe.cli import main

        sys.argv = ["kvpress-moe", *arguments]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    return run


def kill_after(child: int, seconds: float) -> bool:
    """Kill a process after some seconds. Returns False if it ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def save_model(directory: Path) -> None:
    """Save a tiny model that the commands can load."""
    from tests.tiny import byte_tokenizer, tiny_model

    tiny_model("llama", num_hidden_layers=3).save_pretrained(directory)
    byte_tokenizer(chat=True).save_pretrained(directory)


def trained(out: Path) -> tuple[bytes, Any]:
    """The bytes of the routers, and their card without times and paths."""
    card = json.loads((out / "routers" / "routers.json").read_text())
    for name in ("seconds", "command"):
        del card["metrics"][name]
    return (out / "routers" / "routers.safetensors").read_bytes(), card


def recorded(out: Path) -> list[Any]:
    """The records without times."""
    records = [json.loads(line) for line in (out / "run" / "records.jsonl").read_bytes().splitlines()]
    return [{**record, "prefill_s": 0, "results": [row[:-1] for row in record["results"]]} for record in records]


def found(out: Path) -> str:
    """What a killed run left on disk."""
    files = [path for path in out.rglob("*") if path.is_file()]
    shards = sum(path.parent.name == "shards" and path.suffix == ".safetensors" for path in files)
    layers = sum(path.name.startswith("layer-") for path in files)
    lines = sum(path.read_bytes().count(b"\n") for path in files if path.name == "records.jsonl")
    unfinished = sum(path.name.startswith(".") for path in files)
    counted = {"shards": shards, "layers": layers, "records": lines, "unfinished files": unfinished}
    return ", ".join(f"{number} {name}" for name, number in counted.items() if number) or "nothing"


def compare(name: str, make: Callable[[Path], list[str]], result: Callable[[Path], Any], args, work: Path) -> dict:
    """Kill runs of one command. Prints a row for each run, and returns the sums."""
    calm = work / f"{name}-calm"
    started = time.monotonic()
    if not wait(start(command(make(calm)))):
        sys.exit(f"{name}: the undisturbed run failed")
    duration = time.monotonic() - started
    expected = result(calm)
    print(f"\n`kvpress-moe {name}`: undisturbed {duration:.1f} s\n")
    print("| run | killed after, s | left by the kills | done again in, s | same result |\n|---|---|---|---|---|")
    rng = random.Random(f"{name} {args.seed}")
    kills = same = 0
    for number in range(args.runs):
        out = work / f"{name}-{number}"
        first, second = (number + rng.random()) / args.runs * duration, rng.random() * duration
        while not kill_after(start(command(make(out))), first):  # this one was quicker than the undisturbed run
            shutil.rmtree(out)
            first *= 0.9
        killed, left = [f"{first:.2f}"], [found(out)]
        if kill_after(start(command(make(out))), second):
            killed.append(f"{second:.2f}")
            left.append(found(out))
        started = time.monotonic()
        ended = wait(start(command(make(out))))
        again = time.monotonic() - started
        is_same = ended and result(out) == expected
        kills, same = kills + len(killed), same + is_same
        row = (number + 1, " and ".join(killed), "; ".join(left), f"{again:.1f}", "yes" if is_same else "NO")
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        shutil.rmtree(out)
    return {"seconds": round(duration, 1), "runs": args.runs, "kills": kills, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="number of runs of each command")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    for module in NEEDED:
        import_module(module)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        model = work / "model"
        assert wait(start(lambda: save_model(model))), "the tiny model could not be saved"

        def train(out: Path) -> list[str]:
            files = ["--out", str(out / "routers"), "--shards", str(out / "shards")]
            return [*TRAIN.split(), "--model", str(model), *files]

        def bench(out: Path) -> list[str]:
            return [*BENCH.split(), "--model", str(model), "--out", str(out / "run")]

        sums = {
            "train": compare("train", train, trained, args, work),
            "bench": compare("bench", bench, recorded, args, work),
        }
    passed = all(counted["same"] == counted["runs"] for counted in sums.values())
    print(json.dumps({"passed": passed, "seed": args.seed, **sums}, separators=(",", ":")))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
