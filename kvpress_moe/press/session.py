"""Session: what a press does and knows during a ``with press(model)`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpress_moe.cache.masks import count_evicted, fit_masks_after_forward
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.model.hooks import bare_afterwards
from kvpress_moe.model.projection_cache import ProjectionCache
from kvpress_moe.model.transformers_api import given_cache, own_names, returned_cache
from kvpress_moe.press.exclusive_use import exclusive_use, is_in_use
from kvpress_moe.press.input_checks import (
    check_can_serve_padding,
    check_forward,
    check_sees_codes,
    forward_arguments,
    has_eager_attention,
    warn_of_labels,
)
from kvpress_moe.press.padding import rows_alone, text_starts
from kvpress_moe.press.promising import rows_apart
from kvpress_moe.press.transaction import Transaction
from kvpress_moe.routers.active import restore, snapshot


class Session:
    """
    The hooks of one press on one model, and what is known of the current forward pass.

    Outside of a block it is empty. If the press is called then, a wrapper of kvpress calls it.

    Attributes
    ----------
    projections : ProjectionCache
        What the current layer projected in its own forward.
    is_open : bool
        Whether a block is open.
    is_copied : bool
        Whether this is the session of hooks that were copied with a model inside a block.
    text_starts : list of int or None
        Where the text of each row begins in a prompt that is padded on the left. None for a prompt without padding.
    n_prompt : int
        Number of tokens of the prompt that is prefilled now. 0 in other forward passes.
    """

    def __init__(self) -> None:
        self.projections = ProjectionCache()
        self.text_starts: list[int] | None = None
        self.n_prompt = 0
        self.is_open = False
        self.is_copied = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """
        A new session.

        A model that is copied inside the block takes copies of the hooks with it, and of the press. They do nothing: no
        block of theirs is open, and nothing would ever take them off.
        """
        copied = Session()
        copied.is_copied = self.is_open or self.is_copied
        return copied

    def rows(self, call: LayerCall) -> list[LayerCall]:
        """The call itself, or for a padded batch one call for each row, without its padding."""
        return rows_alone(call, self.text_starts)

    def turns_ragged(self, press: Any) -> bool:
        """Whether layers become ragged. Inside a wrapper, which stores equal heads, only if ``budget`` asks for it."""
        shares = press.scope != "uniform" and (is_in_use(press) or press.budget is not None)
        return shares or self.text_starts is not None

    def clear(self) -> None:
        """Forget the current forward pass."""
        self.projections.clear()
        self.text_starts = None

    @contextmanager
    def open(self, press: Any, model: PreTrainedModel, compressing: AbstractContextManager[None]) -> Iterator[None]:
        """
        Compress every prompt that the model prefills inside the block.

        Parameters
        ----------
        press : MoERouterPress
        model : PreTrainedModel
        compressing : context manager
            kvpress's own context manager. It adds and removes the hooks that compress.

        Raises
        ------
        UnsupportedInputError
            If this press is already in use, or another MoERouterPress is in use on this model.
        """
        transaction = Transaction(partial(checkpoint, press))
        with ExitStack() as leave:  # undoes every step at the end, whatever happens in between
            leave.enter_context(exclusive_use(press, model))
            leave.callback(self.clear)
            leave.enter_context(bare_afterwards(model))
            leave.enter_context(compressing)
            before = partial(self._before_forward, press, transaction)
            leave.enter_context(own_names(model, model.model))
            leave.callback(model.register_forward_pre_hook(self._before_loss, with_kwargs=True).remove)
            leave.callback(model.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            leave.callback(model.model.register_forward_hook(self._after_forward).remove)
            leave.callback(model.model.register_forward_hook(transaction.end, always_call=True).remove)
            leave.callback(transaction.close)
            leave.enter_context(self.projections.watch(model))
            self.is_open, self.is_copied = True, False
            leave.callback(setattr, self, "is_open", False)
            yield

    def _before_forward(
        self, press: Any, transaction: Transaction, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse input that would be compressed wrongly and silently. Note where the text of padded rows begins."""
        if self.is_copied:
            return
        arguments = forward_arguments(model, args, kwargs)
        transaction.begin(arguments)
        self.text_starts, self.n_prompt = None, 0
        press._eager = has_eager_attention(model)  # it may have been changed inside the block
        if check_forward(model, arguments) and not press._keeps_everything:
            check_sees_codes(press._eager, press.precision, press.max_kl)
            inputs = arguments.get("input_ids")
            shape = (arguments["inputs_embeds"] if inputs is None else inputs).shape
            self.n_prompt = shape[1]
            starts = text_starts(arguments.get("attention_mask"), arguments.get("position_ids"))
            self.text_starts = rows_apart(press, shape[0], starts)
            if starts is not None:
                check_can_serve_padding(given_cache(arguments), press._eager, press.track_misses)

    def _before_loss(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn of a loss that does not measure the press."""
        if not self.is_copied:
            warn_of_labels(model, args, kwargs)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Fit the masks, and count what presses of kvpress in the same block have evicted beside this one."""
        if self.is_copied:
            return
        fit_masks_after_forward(model, args, output)
        cache = returned_cache(output)
        if self.n_prompt and cache is not None:
            count_evicted(cache, self.n_prompt)


def checkpoint(press: Any, is_prompt: bool) -> Callable[[], None]:
    """A function that takes back everything that a press counts in the forward pass that begins now."""
    if not (is_prompt or press.track_misses):
        return lambda: None  # nothing is counted
    routers, counted = press.routers, press._feedback.stats.snapshot()
    feedback = [] if routers is None else snapshot(routers)
    evicted, keep_fractions = copy(press._feedback.evicted), dict(press._keep_fractions)

    def take_back() -> None:
        press._feedback.stats.restore(counted)
        if routers is None:  # there were none before this pass, which built them
            press._routers = None
        else:
            restore(press.routers, feedback)
        press._feedback.evicted, press._keep_fractions = evicted, keep_fractions
        press._shared.clear()
        press._shared_bytes.clear()
        press._session.projections.clear()

    return take_back
