"""What a job may ask its model for. The scheduler computes it, together with the work of other jobs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import DynamicCache

CHUNK = 256  # tokens of a long prompt that are read at once; other requests wait for them


@dataclass(frozen=True, eq=False)
class Read:
    """
    Read tokens. The answer is the logits (V,) after the last one, on the CPU.

    Attributes
    ----------
    cache : DynamicCache
        It grows.
    input_ids : sequence of int
    """

    cache: DynamicCache
    input_ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class Compress:
    """
    Read a text and compress its cache. The answer is the stored document.

    Attributes
    ----------
    title, prefix : str
    kind : {"document", "prefix"}
    on_layer : callable
        ``on_layer(done, total)``.
    """

    title: str
    prefix: str
    kind: str = "document"
    on_layer: Callable[[int, int], Any] = lambda done, total: None


class Worker(Protocol):
    """What the scheduler needs of an engine."""

    def read(self, reads: Sequence[Read]) -> Sequence[Tensor]:
        """Logits after each."""

    def compress(self, work: Compress, between: Callable[[], Any]) -> Any:
        """A document. ``between()`` is called after each layer; an exception that it raises ends the work."""


def read_in_chunks(
    cache: DynamicCache, input_ids: Sequence[int], chunk: int = CHUNK
) -> Generator[Read, Tensor, Tensor]:
    """Ask for tokens to be read, at most ``chunk`` at a time. Returns the logits (V,) after the last one."""
    logits: Tensor | None = None
    for first in range(0, len(input_ids), chunk):
        logits = yield Read(cache, input_ids[first : first + chunk])
    assert logits is not None
    return logits
