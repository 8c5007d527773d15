"""Plan: the settings of a benchmark run."""

from __future__ import annotations

from dataclasses import dataclass

from kvpress_moe.benchmark.methods import find_methods
from kvpress_moe.benchmark.prompts import SETTINGS
from kvpress_moe.benchmark.tasks import SPLITS
from kvpress_moe.errors import SettingError

Cell = tuple[str, float]


@dataclass(frozen=True)
class Plan:
    """
    The settings of a run. They are plain data, so that they can be sent to other machines.

    Parameters
    ----------
    model : str or None
        As in :func:`kvpress_moe.model.loading.load_model`.
    methods, tasks : tuple of str or None
        ``None``: all methods but the slow ones; the 14 tasks of ``CORE``. ``("all",)``: every task.
    ratios, lengths : tuple
        Compression ratios; context lengths in tokens.
    limit : int
        Samples per task and length.
    seed : int
    split : {"train", "tune", "test"}
    setting : {"agnostic", "aware"}
    sinks, recent : int
        Number of first and of last tokens that every scorer must keep.
    min_share : float
        If heads share a budget, each keeps at least this share of the mean.
    device : str
    hub : str or None
        Take the samples from this data set (a hub id or a directory, in kvpress's schema) instead of generating them.
    by_bytes : bool
        Whether the ratios were asked for as shares of bytes. Only the words of the report depend on it.
    """

    model: str | None = None
    methods: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    lengths: tuple[int, ...] = (1024,)
    limit: int = 20
    seed: int = 0
    split: str = "test"
    setting: str = "agnostic"
    sinks: int = 4
    recent: int = 16
    min_share: float = 0.2
    device: str = "cpu"
    hub: str | None = None
    by_bytes: bool = False

    def check(self) -> None:
        """Raise SettingError for the first wrong field, before anything is loaded."""
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise SettingError(
                    "ratios", ratio, "numbers between 0 and 1", "The full cache is always evaluated too."
                )
        for field, allowed in (("split", SPLITS), ("setting", SETTINGS)):
            if getattr(self, field) not in allowed:
                raise SettingError(field, getattr(self, field), f"one of {', '.join(allowed)}", "")
        for field in ("limit", "sinks", "recent"):
            if getattr(self, field) < (field == "limit"):
                raise SettingError(
                    field, getattr(self, field), "a limit of at least 1, sinks and recent of at least 0", ""
                )
        for length in self.lengths:
            if length < 64:
                raise SettingError("lengths", length, "at least 64 tokens", "")
        coded = [name for name, method in find_methods(self.methods).items() if method.precision is not None]
        if coded and self.methods is not None and not self.by_bytes:
            raise SettingError(
                "methods",
                ", ".join(coded),
                "methods whose pairs stay whole, because --ratios are shares of the pairs",
                "Compare codes with --bytes, for example --bytes 0.25,0.1.",
            )
        if self.hub is None:
            from kvpress_moe.benchmark.tasks import find_tasks

            find_tasks(self.tasks)
