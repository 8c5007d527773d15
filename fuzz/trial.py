"""Try one input with one loader: accepted or refused, and the time and memory that this needed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fuzz.choices import Choices
from fuzz.targets import Files, Target
from kvpress_moe.errors import KVPressMoEError

SECONDS = 20  # time limit for one input
BASE = (
    64 * 2**20
)  # bytes allowed besides twice the files' size: for 1 MiB of parsed JSON and the longest safetensors header


class Fault(AssertionError):
    """A loader did what it must never do."""


@dataclass
class Outcome:
    taken: bool
    size: int
    seconds: float
    extra: int | None  # peak of resident memory minus the memory before, in bytes; None if unknown


def try_one(target: Target, data: bytes) -> Outcome:
    """
    Make an input from bytes and load it.

    Raises
    ------
    Fault
        If the loader raised an error that is not the package's, needed too much time or memory, or wrote outside of its
        directory.
    """
    choices = Choices(data)
    files = choices.pick(target.seeds)
    if not choices.one_in(64):
        files = target.mutate(choices, files)
    return try_files(target, files)


def try_files(target: Target, files: Files) -> Outcome:
    target.put(files)
    outside = listing(target.directory.parent)
    before, peak_known = resident(), forget_peak()
    start = time.perf_counter()
    try:
        with time_limit():
            target.load()
        taken = True
    except KVPressMoEError:
        taken = False
    except BaseException as error:  # includes panics of Rust libraries
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Fault(f"{target.name}: {type(error).__name__}: {str(error)[:300]}") from error
    seconds = time.perf_counter() - start
    size = sum(map(len, files.values()))
    extra = max(0, peak() - before) if peak_known else None
    if extra is not None and extra > 2 * size + BASE:
        raise Fault(f"{target.name}: {extra} bytes of memory for files of {size}")
    if listing(target.directory.parent) != outside:
        raise Fault(f"{target.name}: wrote outside of its directory: {listing(target.directory.parent) - outside}")
    return Outcome(taken, size, seconds, extra)


def listing(directory: Path) -> set[tuple[str, int]]:
    """Names and sizes of everything beside the input's own directory."""
    with os.scandir(directory) as entries:
        return {(entry.name, entry.stat().st_size if entry.is_file() else -1) for entry in entries}


@contextmanager
def time_limit() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident() -> int:
    """Resident memory of this process, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def forget_peak() -> bool:
    """Reset the peak of resident memory. Returns whether the system can do that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """Peak of resident memory since :func:`forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
