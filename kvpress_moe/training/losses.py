"""Targets of the layer-by-layer fit, and its losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.errors import SettingError

FLOOR = -12.0  # natural log; attention below e^-12 counts as none
TEACHERS = ("replay", "answer", "both")


def target(shard: dict[str, Tensor], teacher: str, value_weight: float = 0.0) -> Tensor:
    """
    Importance of a layer's pairs, log scale, shape (H, S), float32.

    Parameters
    ----------
    shard : dict of str -> Tensor
        One layer of what :func:`kvpress_moe.training.capture.capture` recorded.
    teacher : {"replay", "answer", "both"}
        ``"replay"``: the largest attention that a repetition of the context pays. ``"answer"``: the largest attention
        that the real question and answer pay. ``"both"``: the larger of the two.
    value_weight : float, default=0
        The attention is multiplied by what the value adds to the residual stream (relative to the stream's norm),
        raised to this power. 0: attention alone (KVzip, arXiv 2505.23416); 1: the product (KVzip+ of KVzap,
        arXiv 2601.07891).

    Raises
    ------
    SettingError
        If there is no such teacher.
    """
    if teacher not in TEACHERS:
        raise SettingError("teacher", teacher, f"one of {', '.join(TEACHERS)}", "The default is 'both'.")
    both = torch.maximum(shard["replay"], shard["answer"])
    log_attention = both if teacher == "both" else shard[teacher]
    return (log_attention.float() + value_weight * shard["writes"].float()).clamp(min=FLOOR)


def budget_loss(
    scores: Tensor, targets: Tensor, thresholds: Tensor, temperature: float = 0.5, softness: float = 0.25
) -> Tensor:
    """
    Cross-entropy of the question that a budget asks: does this pair stay?

    The question is asked at each threshold of :func:`tail_weights`. Scores and targets have the same unit, so one
    threshold divides both. If score and target are on the same side of a threshold and far from it, the error of the
    score costs almost nothing.

    Parameters
    ----------
    scores, targets : Tensor, shape (N, H)
    thresholds : Tensor, shape (3,)
    temperature, softness : float
        Widths, in nats, of the range around a threshold in which a score (``temperature``) or a target (``softness``)
        counts as undecided.
    """
    belongs = torch.sigmoid((targets[..., None] - thresholds) / softness)
    return F.binary_cross_entropy_with_logits((scores[..., None] - thresholds) / temperature, belongs)


def tail_weights(targets: Tensor, thresholds: Tensor) -> Tensor:
    """
    Weight of each prediction: 0.1 for pairs that no budget keeps, 1 for pairs that all budgets keep.

    Parameters
    ----------
    targets : Tensor, shape (N, H)
    thresholds : Tensor, shape (3,)
        Quantiles of the target over all prompts, layers and heads: half, a quarter and a tenth of the pairs are above.
    """
    return 0.1 + (targets[..., None] > thresholds).float().mean(-1) * 0.9
