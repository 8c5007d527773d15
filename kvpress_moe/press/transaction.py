"""Transaction: a forward pass that ends counts; one that fails is undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from typing import Any

from torch import nn

from kvpress_moe.errors import UnsupportedInputError


class Transaction:
    """
    Watches the forward passes of a model inside one ``with press(model)`` block.

    A pass that raises, or that Ctrl-C ends, leaves nothing behind: what the press counted of it is taken back, and the
    cache of a prompt is as empty as it was before, instead of compressed in some layers and missing in others. Two
    threads may take turns, but not read at once.

    Parameters
    ----------
    checkpoint : callable
        ``checkpoint(is_prompt)`` is called when a pass begins; what it returns takes back what came after.
    """

    def __init__(self, checkpoint: Callable[[bool], Callable[[], None]]):
        self._checkpoint = checkpoint
        self._under_way: dict[str, tuple[threading.Thread, Callable[[], None]]] = {}  # at most one, see `begin`

    def begin(self, arguments: dict[str, Any]) -> None:
        """
        A forward pass begins.

        Parameters
        ----------
        arguments : dict
            Of the forward of the model below its head, by name.

        Raises
        ------
        UnsupportedInputError
            If another thread's pass is under way.
        """
        me = threading.current_thread()
        earlier = self._under_way.get("pass")
        if earlier is not None and earlier[0] is me:
            self._undo()  # Ctrl-C ended it and the caller went on
        cache: Any = arguments.get("past_key_values")
        is_prompt = cache is None or cache.get_seq_length() == 0
        layers = [copy(layer) for layer in cache.layers] if cache is not None and is_prompt else None
        ours = (me, lambda: None)
        reader = self._under_way.setdefault("pass", ours)
        if reader is not ours:
            raise UnsupportedInputError(
                f"model: thread {reader[0].name!r} is reading on this model, expected one forward pass at a time under "
                "a press. Let threads take turns, or load the model once for each, with a press of its own."
            )
        take_back = self._checkpoint(is_prompt)

        def undo() -> None:
            take_back()
            if layers is not None:
                cache.layers[:] = layers

        self._under_way["pass"] = (me, undo)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also called where the pass failed; without an output then."""
        reader = self._under_way.get("pass")
        if reader is None or reader[0] is not threading.current_thread():
            return  # this pass was refused because of another one
        if output is None:
            self._undo()
        else:
            del self._under_way["pass"]

    def close(self) -> None:
        """
        The block is left: undo what Ctrl-C ended.

        Raises
        ------
        UnsupportedInputError
            If another thread is still reading.
        """
        reader = self._under_way.get("pass")
        if reader is None:
            return
        if reader[0] is not threading.current_thread() and reader[0].is_alive():
            raise UnsupportedInputError(
                f"press: the `with` block was left while thread {reader[0].name!r} was still reading, expected it to "
                "be open until then; that prompt's cache is compressed in some layers only. Wait for the thread."
            )
        self._undo()

    def _undo(self) -> None:
        self._under_way.pop("pass")[1]()
