"""Data of the page: small enough for a page, and exact where the budget rule needs it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kvpress_moe.cache.tier import TABLE_BYTES
from kvpress_moe.explore.recording_press import LayerRecord, Strategies
from kvpress_moe.press.packing import N_SINK, SINKS_SHARE

FORMAT = 3


def arrays(records: Mapping[int, LayerRecord]) -> dict[str, Any]:
    """
    Pack the records of all compressed layers.

    Returns
    -------
    dict
        Little-endian arrays in base64, first index slowest:

        - ``scores`` (L, H, S), float32, exact: the budget rule in the browser keeps what Python keeps;
        - ``weights`` (L, S, E), uint16, in 1/65535; positive weights stay positive;
        - ``moves`` (L, H, E, S), int8, in 1/127 of the head's ``move_scale``, the largest of them;
        - ``mass`` (L, H, S), bfloat16.

        Also ``layers`` (the layers' indices), ``heads`` (H) and ``move_scale`` (L lists of H numbers).
    """
    scores = torch.stack([record.scores for record in records.values()])
    weights = torch.stack([record.weights for record in records.values()])
    moves = torch.stack([record.moves for record in records.values()])
    mass = torch.stack([cast(Tensor, record.mass) for record in records.values()])
    scale = moves.abs().amax((-1, -2)).clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "layers": list(records),
        "heads": scores.shape[1],
        "scores": packed(scores),
        "weights": packed(as_levels(weights).to(torch.uint16)),
        "moves": packed((moves / scale[..., None, None] * 127).round().to(torch.int8)),
        "move_scale": scale.tolist(),
        "mass": packed(mass.to(torch.bfloat16).view(torch.int16)),
    }


def strategies(records: Mapping[int, LayerRecord]) -> dict[str, Any] | None:
    """
    Which strategy the pairs get, for every budget. None if the press has no precision.

    Returns
    -------
    dict or None
        - ``menu``: names of the M precisions, such as ``K8V4``, in the order of their bytes;
        - ``nbytes`` (M): bytes of a pair; ``pair_bytes``: as the model wrote it;
        - ``table_bytes``: bytes of a head that are no pairs; ``n_whole``, ``whole_share``: see
          :meth:`kvpress_moe.press.packing.Menu.whole`; 0 if the menu has no whole pairs;
        - ``prices`` (M, L, H, S), uint16, little-endian in base64: logarithm of the switch prices in equal steps.
          65535: at every price; 0: at no price.
    """
    found = [record.strategies for record in records.values()]
    if not all(found):
        return None
    menu = cast(Strategies, found[0]).menu
    prices = torch.stack([cast(Strategies, one).prices for one in found], dim=1)
    return {
        "menu": [str(precision) for precision in menu.precisions],
        "nbytes": menu.nbytes[1:].tolist(),
        "pair_bytes": menu.pair_bytes,
        "table_bytes": TABLE_BYTES * len(menu.precisions),
        "n_whole": N_SINK if menu.has_whole else 0,
        "whole_share": SINKS_SHARE,
        "prices": packed(as_steps(prices).to(torch.uint16)),
    }


def as_steps(prices: Tensor) -> Tensor:
    """Positive prices as whole numbers from 1 to 65534, evenly spaced by their logarithm. Infinity becomes 65535."""
    usual = prices[(prices > 0) & prices.isfinite()].log()
    if not usual.numel():
        return torch.where(prices == torch.inf, 65535, 0)
    low, high = usual.min(), usual.max()
    steps = 1 + ((prices.clamp(min=1e-38).log() - low) / (high - low).clamp(min=1e-6) * 65533).round()
    steps = steps.clamp(1, 65534).masked_fill(prices <= 0, 0)
    return steps.masked_fill(prices == torch.inf, 65535)


def as_levels(weights: Tensor) -> Tensor:
    """Weights in [0, 1] as whole numbers up to 65535; only a weight of 0 becomes 0."""
    return (weights * 65535).round().clamp(min=1).masked_fill(weights == 0, 0)


def packed(values: Tensor) -> str:
    """A tensor's bytes in base64, little-endian."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def payload(
    tokens: Sequence[str],
    records: Mapping[int, LayerRecord],
    experts: Sequence[str],
    budget: Mapping[str, Any],
    bound_to_ratio: Sequence[str],
    about: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    promise: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The page's data, ready for JSON.

    Parameters
    ----------
    tokens : sequence of S str
        The piece of text of each token.
    records : mapping of int -> LayerRecord
    experts : sequence of E str
    budget : mapping
        ``ratio``, ``scope``, ``min_share`` and ``min_pairs`` for which the answers were given; see
        :func:`~kvpress_moe.budget.allocation.least_pairs`.
    bound_to_ratio : sequence of str
        Experts whose scores depend on the ratio.
    about : mapping of str -> str
        Facts to print: the model, sizes.
    answers : sequence of mapping
        ``question``, and ``full`` and ``compressed`` as :func:`~kvpress_moe.explore.tokens.mark_matches` marks them.
    promise : mapping, optional
        What was promised, see :meth:`kvpress_moe.press.statistics.RoutingStats.as_dict`.
    """
    return {
        "format": FORMAT,
        "tokens": list(tokens),
        "experts": list(experts),
        "budget": dict(budget),
        "bound_to_ratio": list(bound_to_ratio),
        "about": dict(about),
        "answers": [dict(answer) for answer in answers],
        "strategies": strategies(records),
        "promise": None if promise is None else dict(promise),
        **arrays(records),
    }
