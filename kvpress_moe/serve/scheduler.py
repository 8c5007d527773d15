"""Scheduler: many clients, one model. Each job computes a step in turn, so that nobody waits for a long answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from kvpress_moe.errors import KVPressMoEError
from kvpress_moe.serve.api_error import APIError

logger = logging.getLogger(__name__)


class Job:
    """
    Work that is done step by step.

    Parameters
    ----------
    steps : callable
        ``steps(emit)`` makes an iterator. Each ``next`` computes one step. Inside a long step, ``emit(value)`` tells
        how far it is, like a value that is yielded.
    on_event : callable
        ``on_event(kind, value)`` with kind ``"item"`` (what a step yielded), ``"error"`` (an exception) or ``"end"``.
        It is called in the scheduler's thread.
    """

    def __init__(self, steps: Callable[[Callable[[Any], Any]], Iterator[Any]], on_event: Callable[[str, Any], Any]):
        self._make, self._on_event = steps, on_event
        self._steps: Iterator[Any] | None = None
        self.is_cancelled = False
        self.looked = time.monotonic()  # when its client was last looked for

    def cancel(self) -> None:
        """Compute no more steps. May be called in any thread."""
        self.is_cancelled = True

    def step(self) -> bool:
        """Compute one step. Returns whether there are more."""
        try:
            if self.is_cancelled:
                self._close()
                return False
            if self._steps is None:
                self._steps = self._make(partial(self._on_event, "item"))
            self._on_event("item", next(self._steps))
            return True
        except StopIteration:
            self._on_event("end", None)
        except Exception as error:  # any error: a client waits for an answer
            if not isinstance(error, KVPressMoEError):
                logger.exception("a request failed")
            with suppress(RuntimeError):  # the event loop may be closed already
                self._on_event("error", error)
        return False

    def _close(self) -> None:
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()


class Scheduler:
    """
    Lets jobs take turns in one thread.

    Parameters
    ----------
    max_active : int
        Number of jobs that take turns. Others wait in the order in which they came.
    max_waiting : int
        Number of jobs that may wait. More are refused with status 429.
    """

    def __init__(self, max_active: int = 8, max_waiting: int = 64):
        self.max_active, self.max_waiting = max_active, max_waiting
        self._active: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_computing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """
        Add a job.

        Raises
        ------
        APIError
            If too many jobs wait (429), or if the server ends (503).
        """
        with self._changed:
            if self._is_closing:
                raise APIError(503, "The server is shutting down.")
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
            if len(self._waiting) >= self.max_waiting:
                raise APIError(429, "Too many requests wait already. Try again later.", code="queue_full")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def n_active(self) -> int:
        """Jobs that take turns, with the one whose step is computed now."""
        return len(self._active) + self._is_computing

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def close(self, timeout: float = 30.0) -> None:
        """Take no more jobs, finish those that are there, and end the thread. After ``timeout`` seconds drop them."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            for job in (*self._active, *self._waiting):
                job.cancel()
        self._thread.join()  # the step that is computed now

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting and len(self._active) < self.max_active:
                    self._active.append(self._waiting.popleft())
                if not self._active:
                    if self._is_closing:
                        return
                    self._changed.wait()
                    continue
                job = self._active.popleft()
                self._is_computing = True
            goes_on = job.step()
            with self._changed:
                self._is_computing = False
                if goes_on:
                    self._active.append(job)
