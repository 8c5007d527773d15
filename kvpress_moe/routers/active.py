"""The routers in use: which routers a model gets, and what the press changes in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvpress_moe.model.layers import Attention
from kvpress_moe.routers.resolve import check_routers, shipped_routers, trained_routers, untrained_routers
from kvpress_moe.routers.routers import Routers

# Both functions leave inference mode: running averages that are made in it could not be updated outside of it.


@torch.inference_mode(False)
def find_trained(router: str | Path | Routers | None, attention: Attention, may_ship: bool) -> Routers | None:
    """
    A copy of the trained routers for the model that an attention layer belongs to. None if there are none.

    Parameters
    ----------
    router : path, str, Routers or None
        The routers that the user gave.
    attention : nn.Module
    may_ship : bool
        Whether routers that ship with the package may be used if the user gave none.
    """
    if router is not None:
        return trained_routers(router)
    return shipped_routers(attention) if may_ship else None


@torch.inference_mode(False)
def activate(
    trained: Routers | None,
    source: str | Path | Routers | None,
    router_type: str,
    experts: Sequence[str],
    dropout: float,
    cache_aware: bool,
    attention: Attention,
) -> Routers:
    """
    Routers that are ready for use: the trained routers, or new ones that weigh all experts alike.

    Parameters
    ----------
    trained : Routers or None
        The result of :func:`find_trained`.
    source : path, str, Routers or None
        Where they come from, for error messages.
    router_type, dropout, cache_aware
        Settings of the press.
    experts : sequence of str
        Names of the press's experts.
    attention : nn.Module
        An attention layer of the model.

    Raises
    ------
    CheckpointError
        If trained routers have another type or other experts, or belong to another model.
    """
    routers = untrained_routers(router_type, experts, dropout, attention) if trained is None else trained
    check_routers(routers, router_type, experts, attention, source)
    set_in_routers(routers, "cache_aware", cache_aware)
    set_in_routers(routers, "dropout", dropout)
    return routers


def set_in_routers(routers: Routers | None, name: str, value: float | bool) -> None:
    """Set ``dropout`` or ``cache_aware`` in the routers of all layers. Does nothing if there are no routers."""
    for router in routers.layers if routers is not None else ():
        if name == "dropout":
            router.dropout.p = value
        elif name == "cache_aware" and hasattr(router, "cache_aware"):
            router.cache_aware = value


def snapshot(routers: Routers) -> list[Tensor]:
    """The running averages of all layers, for :func:`restore`. Routers replace these tensors, so no copy is needed."""
    return list(routers.buffers())


def restore(routers: Routers, before: list[Tensor]) -> None:
    """Go back to the running averages of a snapshot."""
    for rates, earlier in zip(routers.buffers(), before, strict=True):
        rates.copy_(earlier)
