"""Batches padded on the left: where each row's text begins, and each row as a call of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.experts.layer_call import LayerCall


def text_starts(mask: Tensor | None, position_ids: Tensor | None) -> list[int] | None:
    """
    Where each row's text begins in a prompt that is padded on the left. None for a prompt without padding.

    Parameters
    ----------
    mask : Tensor, shape (B, S), or None
        The attention mask that the model gets. Masks of other shapes are not checked here.
    position_ids : Tensor, shape (B, S), or None

    Raises
    ------
    UnsupportedInputError
        If there is padding in other places, a row without text, or positions that do not start at each row's text.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    shown = mask.bool()
    if not bool(shown[:, -1].all() and (shown[:, 1:] >= shown[:, :-1]).all()):
        raise UnsupportedInputError(
            "attention_mask: got a batch with padding on the right, inside a prompt, or a row without text, expected "
            "padding on the left alone. Set tokenizer.padding_side = 'left'."
        )
    starts = (~shown).sum(-1).tolist()
    if position_ids is None or any(
        int(row[start]) for row, start in zip(position_ids.expand_as(mask), starts, strict=True)
    ):
        raise UnsupportedInputError(
            "position_ids: got none that start from 0 at each row's first token, expected them with a padded batch. "
            "Call model.generate, or pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)."
        )
    return starts


def rows_alone(call: LayerCall, starts: Sequence[int] | None) -> list[LayerCall]:
    """
    The rows of a padded prompt, each as a call of its own without its padding. Without padding: the call itself.

    So a router's capacity, the ranks within a head, windows and budgets depend on the row alone.
    """
    if starts is None:
        return [call]
    return [_row_alone(call, row, start) for row, start in enumerate(starts)]


def _row_alone(call: LayerCall, row: int, start: int) -> LayerCall:
    def cut(states: Tensor) -> Tensor:  # (B or 1, S, …)
        return (states[row : row + 1] if states.shape[0] > 1 else states)[:, start:]

    kwargs: dict[str, Any] = {**call.kwargs, "hidden_states": cut(call.hidden_states), "attention_mask": None}
    kwargs["position_embeddings"] = tuple(map(cut, call.kwargs["position_embeddings"]))
    kwargs["cache_position"] = call.kwargs["cache_position"][start:] - start
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = cut(kwargs["position_ids"])
    keys, values = (states[row : row + 1, :, start:] for states in (call.keys, call.values))
    projected = {name: cut(states) for name, states in call.projected.items()}
    hidden_states = kwargs["hidden_states"]
    return LayerCall(call.module, hidden_states, keys, values, None, kwargs, projected=projected, row=row)


def join_rows(kept: Sequence[Tensor], k_len: int) -> Tensor:
    """Join masks (B or 1, H, text) of the pairs that stay into one mask (B, H, S) of the batch. Padding never stays."""
    return torch.cat([F.pad(mask, (k_len - mask.shape[-1], 0)) for mask in kept])
