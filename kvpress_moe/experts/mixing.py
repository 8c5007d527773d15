"""Mixing: the scores of several experts become one score per KV pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers import Routing
from kvpress_moe.routers.calibration import Calibration

# B = batch, H = KV heads, S = cached tokens, E = experts; h is H, or 1 if all heads have the same weights


def rank_within_head(scores: Float[Tensor, "*B S"]) -> Float[Tensor, "*B S"]:
    """
    Replace scores by their mid-rank within the head, in (0, 1).

    The mid-rank is the share of the head's pairs that score lower, plus half of the share that score the same. The raw
    scales of scorers differ by forty orders of magnitude; ranks do not. Equal scores get equal ranks. NaN stays NaN.
    """
    n_scores = scores.shape[-1]
    order = sorting(scores)
    ordered = scores.gather(-1, order)
    places = torch.arange(n_scores, device=scores.device, dtype=torch.int32)
    starts = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)  # runs of equal scores start here
    ends = F.pad(starts[..., 1:], (0, 1), value=True)
    first = torch.where(starts, places, 0).cummax(-1).values
    last = torch.where(ends, places, n_scores).flip(-1).cummin(-1).values.flip(-1)
    ranks = (first + last + 1).to(torch.float32) / (2 * n_scores)
    return torch.empty_like(ranks).scatter_(-1, order, ranks).masked_fill_(scores.isnan(), torch.nan)


def sorting(scores: Float[Tensor, "*B S"]) -> Int[Tensor, "*B S"]:
    """Indices that sort each row; NaN comes last. The order of equal scores is not defined."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.argsort(dim=-1)
    return torch.from_numpy(np.argsort(scores.detach().numpy(), axis=-1))  # three times as fast as torch's sort


def ranks_of(score_expert: Callable[[int], Float[Tensor, "B H S"]], experts: Sequence[int]) -> Float[Tensor, "B E H S"]:
    """
    Ranks within the head by some experts, with one sort for all of them.

    Parameters
    ----------
    score_expert : callable
        Expert index -> scores (B, H, S). Called once for each of ``experts``, and for no other expert.
    experts : sequence of int
    """
    return rank_within_head(torch.stack([score_expert(expert).float() for expert in experts], dim=1))


def mix(
    score_expert: Callable[[int], Tensor], active: Sequence[int], weights: Float[Tensor, "B h S E"]
) -> Float[Tensor, "B H S"]:
    """
    Weighted mean of the experts' ranks.

    Parameters
    ----------
    score_expert : callable
        Expert index -> scores (B, H, S). Called once for every active expert, and for no other expert.
    active : sequence of int
        Experts with a non-zero weight somewhere. If there is only one, its scores are returned unchanged.
    weights : Tensor, shape (B, H or 1, S, E)
        Routing weights, summing to 1 over E.
    """
    if len(active) == 1:
        return score_expert(active[0])
    return (ranks_of(score_expert, active) * of_experts(weights, active)).sum(1)


def mix_calibrated(
    terms: Float[Tensor, "B E H S"],
    experts: Sequence[int],
    weights: Float[Tensor, "B h S E_all"],
    offset: Float[Tensor, " H"],
) -> Float[Tensor, "B H S"]:
    """
    Weighted sum of the experts' calibrated terms. It estimates log attention and compares across heads and layers.

    Each weight is multiplied by the number of experts. So with equal weights the result is the plain sum of the terms.
    A fixed mixture is therefore a special case of the formula, and so is each expert alone.

    Parameters
    ----------
    terms : Tensor, shape (B, E, H, S)
        Calibrated terms of the experts that judge any pair.
    experts : sequence of int
        Indices of these experts.
    weights : Tensor, shape (B, H or 1, S, all experts)
        Routing weights, summing to 1.
    offset : Tensor, shape (H,)
        Offset of each head.
    """
    return weights.shape[-1] * (terms * of_experts(weights, experts)).sum(1) + offset[:, None]


def calibrated_scores(
    calibration: Calibration,
    weights: Float[Tensor, "B h S E_all"],
    active: Sequence[int],
    ranks: Float[Tensor, "B E H S"] | None,
    ranked: Sequence[int],
    learned: int | None,
    importance: Callable[[], Float[Tensor, "B H S"]],
) -> Float[Tensor, "B H S"]:
    """
    The calibrated mixture of all active experts. The press and the training both compute it here.

    Parameters
    ----------
    calibration : Calibration
        Calibration of the layer's router.
    weights : Tensor, shape (B, H or 1, S, all experts)
        Routing weights.
    active : sequence of int
        Experts that judge any pair.
    ranks : Tensor, shape (B, ranked experts, H, S), or None
        Ranks within the head by the experts that score by ranks. None if there are no such ranks.
    ranked : sequence of int
        Indices of these experts. All active experts except ``learned`` are among them.
    learned : int or None
        Index of the expert ``"learned"``. None if it is not among the experts.
    importance : callable
        Returns the log importance (B, H, S) of the expert ``"learned"``. Called only if that expert is active.
    """
    terms: dict[int, Tensor] = {}
    if ranks is not None:
        terms = dict(zip(ranked, calibration.terms(ranks, ranked).unbind(1), strict=True))
    if learned is not None and learned in active:
        terms[learned] = calibration.slope[:, learned, None] * importance()  # in log attention already
    stacked = torch.stack([terms[index] for index in active], dim=1)
    return mix_calibrated(stacked, active, weights, calibration.offset)


def mix_experts(
    call: LayerCall, routing: Routing, experts: Sequence[Expert], compression_ratio: float | None
) -> Float[Tensor, "B H S"]:
    """Mixed score (B, H, S) of the experts that judge any pair of a call, less what it loses with distance."""
    scores = mix_near(call, routing, experts, compression_ratio)
    calibration = routing.router.calibration
    fading = None if calibration is None else calibration.fading(call.distances)
    return scores if fading is None else scores - fading


def mix_near(
    call: LayerCall, routing: Routing, experts: Sequence[Expert], compression_ratio: float | None
) -> Float[Tensor, "B H S"]:
    """
    Mixed score (B, H, S) of the experts that judge any pair of a call, as if all pairs were near the prompt's end.

    The other experts are not computed, with one exception: if the expert ``"learned"`` is active and sees ranks, all
    experts are ranked for it.
    """

    def score(index: int) -> Tensor:
        return experts[index].score(call, compression_ratio, routing)

    router, active = routing.router, routing.active
    if router.calibration is None:
        return mix(score, active, routing.weights)
    learned = next((index for index, expert in enumerate(experts) if expert.name == "learned"), None)
    sees_others = learned in active and router.learned is not None and router.learned.num_seen > 0
    ranked = [index for index in (range(len(experts)) if sees_others else active) if index != learned]
    ranks = ranks_of(score, ranked) if ranked else None

    def importance() -> Tensor:
        return experts[cast(int, learned)].score(call, compression_ratio, routing, ranks)

    return calibrated_scores(router.calibration, routing.weights, active, ranks, ranked, learned, importance)


def of_experts(weights: Float[Tensor, "B h S E_all"], experts: Sequence[int]) -> Float[Tensor, "B E h S"]:
    """Routing weights of some experts, with the same axes as their scores. No copy if these are all experts."""
    chosen = weights if len(experts) == weights.shape[-1] else weights[..., list(experts)]
    return chosen.movedim(-1, 1)
