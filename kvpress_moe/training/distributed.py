"""Processes that train together, each on its own device, as `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

Work = TypeVar("Work")


class Processes:
    """
    This process alone, and the base class of several processes that train together.

    Attributes
    ----------
    rank, size : int
        Number of this process (from 0), and number of processes.
    """

    rank: int = 0
    size: int = 1

    def part(self, work: Sequence[Work]) -> Sequence[Work]:
        """The part of some work that this process does."""
        return work[self.rank :: self.size]

    def wait(self) -> None:
        """Return when all processes have called this."""


def first_does(processes: Processes, work: Callable[[], Work]) -> Work:
    """
    What some work returns that only the first process does.

    The work leaves its result on disk. The others wait, and then call it to load that.
    """
    if processes.rank:
        processes.wait()
        return work()
    done = work()
    processes.wait()
    return done


class LaunchedProcesses(Processes):
    """The processes that `accelerate launch` (or torchrun) started, on one machine or many."""

    def __init__(self, device: str):
        from accelerate import PartialState

        # One process may work for hours while the others wait, e.g. when routers are tuned end to end.
        self._state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device = str(self._state.device)

    def wait(self) -> None:
        self._state.wait_for_everyone()


def launched(device: str) -> LaunchedProcesses | None:
    """The processes that this process was started with; None if it was started alone."""
    return LaunchedProcesses(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
