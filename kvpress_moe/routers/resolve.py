"""Routers for a model: built untrained, or loaded and checked against the experts and the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from kvpress_moe.errors import CheckpointError
from kvpress_moe.model.fingerprint import check_fingerprint, fingerprint
from kvpress_moe.model.layers import Attention, slides
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.routers.checkpoint import directory_at, load_routers, read_fingerprint

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "data" / "routers"


@cache  # once per process, because some programs build a press for each request
def warn_untrained() -> None:
    """Warn that the routers are untrained."""
    logger.warning(
        "MoERouterPress: the routers are untrained and weigh all experts alike until cache feedback moves them. "
        "Pass router= (a directory, a hub id or a Routers object) to use trained ones."
    )


def fits(routers: Routers, attention: Attention) -> bool:
    """Whether routers have the size of the model that an attention layer belongs to."""
    config = attention.config
    return (routers.config.num_layers, routers.config.hidden_size) == (config.num_hidden_layers, config.hidden_size)


def belong(routers: Routers, attention: Attention) -> bool:
    """Whether routers were made for exactly the model whose first attention layer is given."""
    if not fits(routers, attention):
        return False
    return routers.fingerprint is None or agree(routers.fingerprint, fingerprint(attention.config, attention))


def agree(saved: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether two fingerprints are of the same model."""
    try:
        check_fingerprint(saved, model, "routers")
    except CheckpointError:
        return False
    return True


def untrained_routers(router_type: str, experts: Sequence[str], dropout: float, attention: Attention) -> Routers:
    """New routers, which prefer no expert, for the model that an attention layer belongs to."""
    config = attention.config
    router_config = RouterConfig(router_type, tuple(experts), config.num_hidden_layers, config.hidden_size, dropout)
    return Routers(router_config, fingerprint(config, attention) if attention.layer_idx == 0 else None)


def trained_routers(router: str | Path | Routers) -> Routers:
    """A copy of the given routers, or the routers saved at ``router``. Feedback does not change the original."""
    return deepcopy(router) if isinstance(router, Routers) else load_routers(router)


def shipped_routers(attention: Attention) -> Routers | None:
    """The routers that ship with the package for the model of an attention layer. None if there are none."""
    directory = shipped_directory(attention)
    return None if directory is None else load_routers(directory)


def shipped_directory(attention: Attention) -> Path | None:
    """Where the routers that ship for the model of an attention layer are. None if there are none."""
    if attention.layer_idx != 0:  # the weights of a model are compared at its first layer
        return None
    own = fingerprint(attention.config, attention)
    for directory in sorted(SHIPPED.glob("*/")):
        if agree(read_fingerprint(directory), own):
            return directory
    return None


def directory_of(router: str | Path | None, attention: Attention) -> Path:
    """
    The directory of routers: those that were given, or those that ship for the model of a first attention layer.

    Raises
    ------
    CheckpointError
        If there are none.
    """
    directory = shipped_directory(attention) if router is None else directory_at(router)
    if directory is None:
        raise CheckpointError(
            "router: got None, expected routers, because none ship for this model. Train some: kvpress-moe train."
        )
    return directory


def check_transforms(routers: Routers, attention: Attention, source: str) -> None:
    """
    Raise unless there are no key transforms, or one for each layer that is compressed, with the model's heads.

    Raises
    ------
    CheckpointError
    """
    if routers.key_transforms is None:
        return
    config = attention.config
    wanted = {index for index in range(config.num_hidden_layers) if not slides(config, index)}
    shape = (config.num_key_value_heads, attention.head_dim)
    found = {tuple(transform.mean.shape) for transform in routers.key_transforms.values()}
    if not wanted <= routers.key_transforms.keys() or found != {shape}:
        raise CheckpointError(
            f"router: {source} has key transforms of {len(routers.key_transforms)} layers, of heads {sorted(found)}, "
            f"expected all {len(wanted)} layers with full attention and {shape}. Fit them again: "
            "python -m experiments.key_transforms."
        )


def check_routers(
    routers: Routers,
    router_type: str,
    experts: Sequence[str],
    attention: Attention,
    source: str | Path | Routers | None,
) -> None:
    """
    Raise unless routers have this type and these experts, and belong to this model.

    Raises
    ------
    CheckpointError
        The message says what differs. Weights of the model are compared only at layer 0, where they were sampled.
    """
    source = "the Routers object" if isinstance(source, Routers) else str(source)
    if routers.config.router_type != router_type:
        raise CheckpointError(
            f"router: {source} holds routers of type {routers.config.router_type!r}, the press asks for "
            f"{router_type!r}. Pass router_type={routers.config.router_type!r}."
        )
    if routers.config.experts != tuple(experts):
        raise CheckpointError(
            f"router: {source} was made for experts {list(routers.config.experts)}, the press has {list(experts)}. "
            f"Pass experts={list(routers.config.experts)}."
        )
    if not fits(routers, attention):
        raise CheckpointError(
            f"router: {source} has {routers.config.num_layers} layers of width {routers.config.hidden_size}, the "
            f"model {attention.config.num_hidden_layers} of width {attention.config.hidden_size}. Use a router of this "
            "model, or router=None."
        )
    if routers.config.num_heads not in (0, attention.config.num_key_value_heads):
        raise CheckpointError(
            f"router: {source} was calibrated for {routers.config.num_heads} KV heads, the model has "
            f"{attention.config.num_key_value_heads}. Use a router of this model, or router=None."
        )
    check_transforms(routers, attention, source)
    if routers.fingerprint is not None and attention.layer_idx == 0:
        check_fingerprint(routers.fingerprint, fingerprint(attention.config, attention), source)
