"""Job runner: explores one text at a time, in a thread, and reports its progress."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.errors import BusyError, KVPressMoEError, SettingError
from kvpress_moe.explore.exploration import explore, make_press, prefill_text
from kvpress_moe.explore.page import page
from kvpress_moe.explore.recording_press import RecordingPress

logger = logging.getLogger(__name__)

KEPT_JOBS = 3  # older jobs and their pages are deleted


@dataclass
class Job:
    """
    One text under one or more settings.

    Attributes
    ----------
    state : {"working", "done", "failed"}
    description : str
        The current step.
    done, total : int
        Progress of the current step.
    error : str
        Why it failed.
    pages : list of str
        One HTML page for each setting, once it is done.
    """

    state: str = "working"
    description: str = "starting"
    done: int = 0
    total: int = 1
    error: str = ""
    pages: list[str] = field(default_factory=list)

    def step(self, description: str, total: int | None = None, advance: int = 0) -> None:
        """Report progress, as the commands' bars do."""
        self.done = 0 if total is not None else self.done
        self.total = total or self.total
        self.description = description
        self.done += advance

    def as_dict(self) -> dict[str, Any]:
        """The state that a browser asks for, as plain data."""
        names = ("state", "description", "done", "total", "error")
        return {name: getattr(self, name) for name in names} | {"pages": len(self.pages)}


class JobRunner:
    """
    Explores texts with one model, one text at a time.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    max_new_tokens : int
        Longest answer, in tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 32):
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.jobs: dict[str, Job] = {}
        self._at_work = threading.Lock()

    def submit(self, context: str, questions: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> str:
        """
        Start a job. Returns its name, which is its key in :attr:`jobs`.

        Parameters
        ----------
        context : str
        questions : sequence of str
        settings : sequence of mapping
            Settings of the press, one for each page.

        Raises
        ------
        SettingError
            If the text is empty or a setting is wrong.
        BusyError
            If the model is busy with another text.
        """
        if not context.strip():
            raise SettingError("TEXT", "", "a text with something in it", "Paste or type one.")
        presses = [make_press(setting) for setting in settings]
        if not self._at_work.acquire(blocking=False):
            raise BusyError("The model works on another text. Wait until it has finished.")
        name = secrets.token_urlsafe(16)
        job = self.jobs[name] = Job()
        while len(self.jobs) > KEPT_JOBS:
            del self.jobs[next(iter(self.jobs))]
        self._start(lambda: self._work(job, context, questions, presses))
        return name

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _work(self, job: Job, context: str, questions: Sequence[str], presses: Sequence[RecordingPress]) -> None:
        try:
            for press in presses:  # so that routers that do not fit fail before the prefill
                press.post_init_from_model(self.model)
            prefilled = prefill_text(self.model, self.tokenizer, context, questions, self.max_new_tokens, job.step)
            job.pages = [page(explore(prefilled, press, job.step)) for press in presses]
            job.state = "done"
        except Exception as error:  # any error: the browser waits for an answer
            job.error = str(error) if isinstance(error, KVPressMoEError) else f"{type(error).__name__}: {error}"
            job.state = "failed"
            if not isinstance(error, KVPressMoEError):
                logger.exception("exploring a text failed")
        finally:
            self._at_work.release()
