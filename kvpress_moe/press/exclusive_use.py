"""Who is in use: a press serves one model at a time, and a model one MoERouterPress."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvpress_moe.errors import UnsupportedInputError

# id of a press or a model -> the block that holds it, by the name of its thread. It belongs to the process, not to the
# press: a copy of a press that is in use is free. `setdefault` is atomic, and a fork cannot leave it locked.
_HELD: dict[int, str] = {}


def is_in_use(press: Any) -> bool:
    """Whether a ``with press(model)`` block of this very press is open, in any thread."""
    return id(press) in _HELD


@contextmanager
def exclusive_use(press: Any, model: Any) -> Iterator[None]:
    """
    Hold a press and a model for the length of a block.

    Raises
    ------
    UnsupportedInputError
        If either is held already, by this thread or another; then neither is held by this one.
    """
    block = f"thread {threading.current_thread().name!r}"  # a new string: its identity is the block's
    holder = _HELD.setdefault(id(press), block)
    if holder is not block:
        if _HELD.get(id(model)) is holder:
            raise UnsupportedInputError(
                f"press: this press is in use on this model already (in {holder}), expected one `with` block at a "
                "time; every prompt would be compressed twice. Leave the inner block out."
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
