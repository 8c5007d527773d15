"""A server in a process of its own, documents for it, and what its metrics say: for the experiments with servers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from kvpress_moe.benchmark.tasks import make_sample

KINDS = ("prose", "documents", "facts", "dialogue", "code", "table")
QUESTIONS = (
    "What is this text about?",
    "Who is named first?",
    "Which numbers are in the text?",
    "How does the text end?",
    "Name three things from the text.",
)


@dataclass
class Served:
    """
    A server that runs.

    Attributes
    ----------
    process : Popen
    address : str
        Without a path.
    client : httpx.Client
    """

    process: subprocess.Popen[str]
    address: str
    client: httpx.Client

    @property
    def model(self) -> str:
        """The name of its model."""
        return str(self.client.get("/v1/models").json()["data"][0]["id"])

    def post(self, text: str) -> dict[str, Any]:
        """Post a document. Returns it."""
        answer = self.client.post("/v1/documents", json={"text": text})
        answer.raise_for_status()
        return dict(answer.json())

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.split()[0] == f"kvpress_moe_{name}")

    def rss_mib(self) -> float:
        """Resident memory of the process."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def kill(self) -> None:
        """SIGKILL, as when a machine goes down."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> int:
        """Ctrl-C. Returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def start(caches: Path, *arguments: str) -> Served:
    """Start ``kvpress-moe serve`` on a free port, and wait until it says its address."""
    command = [sys.executable, "-m", "kvpress_moe", "serve", "--port", "0", "--caches", str(caches), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    assert process.stdout is not None
    address = process.stdout.readline().partition("/v1")[0]
    if not address.startswith("http"):
        raise RuntimeError(f"the server did not start: kvpress-moe {' '.join(command[3:])}")
    return Served(process, address, httpx.Client(base_url=address, timeout=3600))


@contextmanager
def served(caches: Path, *arguments: str) -> Iterator[Served]:
    """A server that is ended with the block."""
    server = start(caches, *arguments)
    try:
        yield server
    finally:
        server.client.close()
        server.kill()


def save(directory: Path, name: str, lines: Sequence[str], found: Mapping[str, Any]) -> None:
    """Write a table and its figures, and print both."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text("\n".join(lines) + "\n")
    (directory / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))
    print(json.dumps(found))


def versions(*more: str) -> str:
    """The versions that figures depend on."""
    return ", ".join(f"{name} {version(name)}" for name in ("kvpress-moe", "torch", "transformers", *more))


def texts(count_tokens: Callable[[str], int], length: int, seed: int = 0) -> Iterator[str]:
    """Texts of at most ``length`` tokens, of several kinds in turn; never the same again."""
    chance = random.Random(seed)
    number = 0
    while True:
        sample = make_sample(KINDS[number % len(KINDS)], count_tokens, length, chance.randrange(10**6), seed, "tune")
        yield sample.context
        number += 1
