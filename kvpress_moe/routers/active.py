"""The routers in use: which ones a model gets, and what the press changes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvpress_moe.model.layers import Attention
from kvpress_moe.routers.resolve import check_routers, shipped_routers, trained_routers, untrained_routers
from kvpress_moe.routers.routers import Routers

# Outside inference mode: running averages that were made inside it could not be updated elsewhere.


@torch.inference_mode(False)
def find_trained(router: str | Path | Routers | None, attention: Attention, may_ship: bool) -> Routers | None:
    """
    A copy of the trained routers for the model that an attention layer belongs to.

    Parameters
    ----------
    router : path, str, Routers or None
        Those that the user named.
    attention : nn.Module
    may_ship : bool
        Whether those that ship with the package will do where none is named.
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
    Routers that are ready for use: the trained ones, else new ones that weigh all experts alike.

    Parameters
    ----------
    trained : Routers or None
        What :func:`find_trained` gave.
    source : path, str, Routers or None
        Where they come from, for the text of errors.
    router_type, dropout, cache_aware
        As the press has them.
    experts : sequence of str
        Names of the press's experts.
    attention : nn.Module
        Of the model.

    Raises
    ------
    CheckpointError
        If trained routers are of another type, experts or model.
    """
    routers = untrained_routers(router_type, experts, dropout, attention) if trained is None else trained
    check_routers(routers, router_type, experts, attention, source)
    set_in_routers(routers, "cache_aware", cache_aware)
    set_in_routers(routers, "dropout", dropout)
    return routers


def set_in_routers(routers: Routers | None, name: str, value: float | bool) -> None:
    """Let all layers' routers follow ``dropout`` or ``cache_aware`` of the press; nothing where there are none."""
    for router in routers.layers if routers is not None else ():
        if name == "dropout":
            router.dropout.p = value
        elif name == "cache_aware" and hasattr(router, "cache_aware"):
            router.cache_aware = value


def snapshot(routers: Routers) -> list[Tensor]:
    """The running averages of all layers, as they are; :func:`restore` goes back to them."""
    return list(routers.buffers())


def restore(routers: Routers, before: list[Tensor]) -> None:
    """Go back to earlier running averages; routers never write into them in place."""
    for rates, earlier in zip(routers.buffers(), before, strict=True):
        rates.copy_(earlier)
