"""Exclusive use: a press serves one model at a time, and a model has one MoERouterPress at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvpress_moe.errors import UnsupportedInputError

# id of a press or a model -> the block that holds it, as a text that names the block's thread. The table belongs to the
# process, not to the press, so a copy of a press in use is free. `setdefault` is atomic. There is no lock that a fork
# could leave locked.
_HELD: dict[int, str] = {}


def is_in_use(press: Any) -> bool:
    """Whether a ``with press(model)`` block of exactly this press is open, in any thread."""
    return id(press) in _HELD


@contextmanager
def exclusive_use(press: Any, model: Any) -> Iterator[None]:
    """
    Reserve a press and a model for the duration of a block.

    Raises
    ------
    UnsupportedInputError
        If this or another thread already holds the press or the model. Then this block holds neither of them.
    """
    block = f"thread {threading.current_thread().name!r}"  # a new string; its identity marks this block
    holder = _HELD.setdefault(id(press), block)
    if holder is not block:
        if _HELD.get(id(model)) is holder:
            raise UnsupportedInputError(
                f"press: this press is in use on this model already (in {holder}), expected one `with` block at a "
                "time; every prompt would be compressed twice. Remove the inner block."
            )
        raise UnsupportedInputError(
            f"press: this press is in use on another model (in {holder}), expected one at a time; its routers, counts "
            "and shared budget are one model's. Make a press for each."
        )
    try:
        holder = _HELD.setdefault(id(model), block)
        if holder is not block:
            raise UnsupportedInputError(
                f"model: another MoERouterPress is in use on this model (in {holder}), expected one at a time; every "
                "prompt would be compressed twice. Leave that block first, or load the model once for each thread."
            )
        try:
            yield
        finally:
            del _HELD[id(model)]
    finally:
        del _HELD[id(press)]
