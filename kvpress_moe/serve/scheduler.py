"""Scheduler: many clients, one model. Answers grow together, one token each; a new document is read between them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

from kvpress_moe.errors import KVPressMoEError
from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.work import CHUNK, Compress, Read, Worker

logger = logging.getLogger(__name__)

Steps = Generator[Any, Any, None]


class Cancelled(Exception):
    """Ends the work for a client that is gone."""


class Job:
    """
    Work for a client.

    Parameters
    ----------
    steps : callable
        ``steps(emit)`` makes a generator. It yields events for the client, or a
        :class:`~kvpress_moe.serve.work.Read` or :class:`~kvpress_moe.serve.work.Compress`, for which it is sent the
        answer. While its work is computed, ``emit(value)`` tells how far it is, like a value that is yielded.
    on_event : callable
        ``on_event(kind, value)`` with kind ``"item"`` (what was yielded), ``"error"`` (an exception) or ``"end"``.
        It is called in the scheduler's thread.
    """

    def __init__(self, steps: Callable[[Callable[[Any], Any]], Steps], on_event: Callable[[str, Any], Any]):
        self._make, self._on_event = steps, on_event
        self._steps: Steps | None = None
        self.wants: Read | Compress | None = None
        self.has_ended = False
        self.is_cancelled = False
        self.last_look = time.monotonic()  # when its client was last looked for

    def cancel(self) -> None:
        """Compute no more. May be called in any thread."""
        self.is_cancelled = True

    def go_on(self, answer: Any = None, error: Exception | None = None) -> None:
        """Give the job its answer, or an error, and run it until it wants something else or ends."""
        self.wants = None
        try:
            while not self.is_cancelled:
                if self._steps is None:
                    self._steps = self._make(partial(self._on_event, "item"))
                value = self._steps.send(answer) if error is None else self._steps.throw(error)
                answer, error = None, None
                if isinstance(value, (Read, Compress)):
                    self.wants = value
                    return
                self._on_event("item", value)
        except StopIteration:
            self._tell("end", None)
        except Exception as failure:  # any error: a client waits for an answer
            if not isinstance(failure, KVPressMoEError):
                logger.exception("a request failed")
            self._tell("error", failure)
        self.end()

    def end(self) -> None:
        """Free what the job holds."""
        self.has_ended, self.wants = True, None
        if self._steps is not None:
            self._steps.close()

    def _tell(self, kind: str, value: Any) -> None:
        with suppress(RuntimeError):  # the event loop may be closed already
            self._on_event(kind, value)


class Scheduler:
    """
    Computes the work of all jobs in one thread.

    In each round all answers grow by one token, in one forward pass. Prompts are read in the same pass, in chunks, the
    short ones first. One document at a time is read, layer by layer; the answers get as much time as it takes.

    Parameters
    ----------
    worker : Worker
    max_active : int
        Number of answers that are computed together. Others wait in the order in which they came.
    max_waiting : int
        Number of jobs that may wait, documents among them. More are refused with status 429.
    """

    def __init__(self, worker: Worker, max_active: int = 16, max_waiting: int = 64):
        self.worker, self.max_active, self.max_waiting = worker, max_active, max_waiting
        self._active: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
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
            if len(self._waiting) + max(0, len(self._documents()) - 1) >= self.max_waiting:
                raise APIError(429, "Too many requests wait already. Try again later.", code="queue_full")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def n_active(self) -> int:
        """Jobs that are computed."""
        return len(self._active) - max(0, len(self._documents()) - 1)

    @property
    def n_waiting(self) -> int:
        """Jobs that wait. All documents but one do."""
        return len(self._waiting) + max(0, len(self._documents()) - 1)

    def _documents(self) -> list[Job]:
        return [job for job in self._active if isinstance(job.wants, Compress)]

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
                while not self._waiting and not self._active:
                    if self._is_closing:
                        return
                    self._changed.wait()
            self._round()
            documents = self._documents()
            if documents:
                self._compress(documents[0])

    def _round(self) -> bool:
        """Let all answers grow by one token, and read of the prompts what fits. Returns whether there was anything."""
        self._admit()
        self._drop_ended()
        reading = [(len(job.wants.input_ids), job) for job in self._active if isinstance(job.wants, Read)]
        chosen, n_tokens = [], 0
        for n_own, job in sorted(reading, key=lambda pair: pair[0]):
            n_long = n_own if n_own > 1 else 0
            if n_tokens == 0 or n_tokens + n_long <= CHUNK:
                chosen.append(job)
                n_tokens += n_long
        if chosen:
            try:
                answers = self.worker.read([job.wants for job in chosen if isinstance(job.wants, Read)])
            except Exception as error:  # some of the caches may have grown; none can be used again
                shown: Exception = error
                if len(chosen) > 1:
                    logger.exception("a round of %d requests failed", len(chosen))
                    shown = APIError(500, "The server failed on this request, or on one beside it. Its log says more.")
                for job in chosen:
                    job.go_on(error=shown)
            else:
                for job, answer in zip(chosen, answers, strict=True):
                    job.go_on(answer)
            self._drop_ended()
        return bool(chosen)

    def _admit(self) -> None:
        """Start jobs that wait, while there is room."""
        while True:
            with self._changed:
                if not self._waiting or len(self._active) - len(self._documents()) >= self.max_active:
                    return
                job = self._waiting.popleft()
                self._active.append(job)
            job.go_on()

    def _drop_ended(self) -> None:
        for job in self._active:
            if job.is_cancelled and not job.has_ended:
                job.end()
        with self._changed:
            self._active = [job for job in self._active if not job.has_ended]

    def _compress(self, job: Job) -> None:
        work = job.wants
        assert isinstance(work, Compress)
        since, owed = time.perf_counter(), 0.0  # owed: seconds that the answers have waited for longer than they took

        def between() -> None:
            nonlocal since, owed
            if job.is_cancelled:
                raise Cancelled
            now = time.perf_counter()
            owed += now - since
            while owed > 0 and self._round():
                before, now = now, time.perf_counter()
                owed -= now - before
            owed, since = min(owed, 0.0), time.perf_counter()

        try:
            document = self.worker.compress(work, between)
        except Cancelled:
            job.end()
        except Exception as error:  # the job may know what to do without the document
            job.go_on(error=error)
        else:
            job.go_on(document)
