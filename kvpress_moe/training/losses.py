"""What a router is asked to predict, and how a wrong prediction is weighed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.errors import SettingError

FLOOR = -12.0  # natural log; attention below e^-12 is as good as none
TEACHERS = ("replay", "answer", "both")


def target(shard: dict[str, Tensor], teacher: str, value_weight: float = 0.0) -> Tensor:
    """
    Importance of a layer's pairs, log scale, shape (H, S), float32.

    Parameters
    ----------
    shard : dict of str -> Tensor
        One layer of what :func:`kvpress_moe.training.capture.capture` recorded.
    teacher : {"replay", "answer", "both"}
        Largest attention that a repetition of the context pays; that of the real question and answer; the larger of
        both.
    value_weight : float, default=0
        Power of what the value adds to the residual stream, relative to its norm, in the product with the attention. 0:
        attention alone (KVzip, arXiv 2505.23416); 1: the product (KVzip+ of KVzap, arXiv 2601.07891).
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
    Cross-entropy of the question that a budget asks: does this pair belong to those that stay?

    Asked at each of the thresholds that :func:`tail_weights` takes too; scores and targets share their unit, so one
    threshold divides both. What is far from every threshold costs nothing, however wrong its score is.

    Parameters
    ----------
    scores, targets : Tensor, shape (N, H)
    thresholds : Tensor, shape (3,)
    temperature, softness : float
        Widths, in nats, within which a score and a target count as undecided.
    """
    belongs = torch.sigmoid((targets[..., None] - thresholds) / softness)
    return F.binary_cross_entropy_with_logits((scores[..., None] - thresholds) / temperature, belongs)


def tail_weights(targets: Tensor, thresholds: Tensor) -> Tensor:
    """
    Weight of each prediction: small for pairs that no budget keeps, large for those that all do.

    Parameters
    ----------
    targets : Tensor, shape (N, H)
    thresholds : Tensor, shape (3,)
        The prompt set's quantiles of the target over all layers and heads where half, a quarter and a tenth stay.
    """
    return 0.1 + (targets[..., None] > thresholds).float().mean(-1) * 0.9
