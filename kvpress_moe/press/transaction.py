"""Transaction: a forward pass that ends is counted; one that fails leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from typing import Any

from torch import nn

from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.transformers_api import given_cache


class Transaction:
    """
    Watches the forward passes of a model inside one ``with press(model)`` block.

    A pass fails if it raises an exception or if Ctrl-C ends it. Then everything that the press counted in this pass is
    taken back, and the cache of a prompt is as empty as before. So it never happens that some layers are compressed and
    others are missing. Two threads may take turns, but only one may be in a forward pass at a time.

    Parameters
    ----------
    checkpoint : callable
        ``checkpoint(is_prompt)`` is called when a pass begins. It returns a function that takes back everything that
        is counted after that.
    """

    def __init__(self, checkpoint: Callable[[bool], Callable[[], None]]):
        self._checkpoint = checkpoint
        self._under_way: dict[str, tuple[threading.Thread, Callable[[], None]]] = {}  # one entry at most

    def begin(self, arguments: dict[str, Any]) -> None:
        """
        Note that a forward pass begins, and remember the state before it.

        Parameters
        ----------
        arguments : dict
            Arguments of the forward pass of the model without its head, by name.

        Raises
        ------
        UnsupportedInputError
            If another thread's pass is under way.
        """
        me = threading.current_thread()
        earlier = self._under_way.get("pass")
        if earlier is not None and earlier[0] is me:
            self._undo()  # Ctrl-C ended that pass, and the caller went on
        cache: Any = given_cache(arguments)
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
        """Forward hook. torch also calls it if the pass failed; the output is None then."""
        reader = self._under_way.get("pass")
        if reader is None or reader[0] is not threading.current_thread():
            return  # this pass was refused because of another one
        if output is None:
            self._undo()
        else:
            del self._under_way["pass"]

    def close(self) -> None:
        """
        Take back a pass that Ctrl-C ended. Called when the block is left.

        Raises
        ------
        UnsupportedInputError
            If another thread is still in a forward pass.
        """
        reader = self._under_way.get("pass")
        if reader is None:
            return
        if reader[0] is not threading.current_thread() and reader[0].is_alive():
            raise UnsupportedInputError(
                f"press: the `with` block was left while thread {reader[0].name!r} was still reading, expected the "
                "block to stay open until the thread is done; its cache is compressed in some layers only. Wait for "
                "the thread."
            )
        self._undo()

    def _undo(self) -> None:
        self._under_way.pop("pass")[1]()
