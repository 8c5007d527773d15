"""What a router is asked to predict, and how a wrong prediction is weighed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.errors import SettingError

FLOOR = -12.0  # natural log; attention below e^-12 is as good as none
TEACHERS = ("replay", "written", "answer", "both")


def target(shard: dict[str, Tensor], teacher: str) -> Tensor:
    """
    Importance of a layer's pairs, log scale, shape (H, S), float32.

    Parameters
    ----------
    shard : dict of str -> Tensor
        One layer of what :func:`kvpress_moe.training.capture.capture` recorded.
    teacher : {"replay", "written", "answer", "both"}
        Largest attention that a repetition of the context pays; the same times the norm of what the value writes; that
        of the real question and answer; the larger of the first and the third.
    """
    if teacher == "replay":
        log_attention = shard["replay"]
    elif teacher == "written":
        log_attention = shard["replay"] + shard["writes"]
    elif teacher == "answer":
        log_attention = shard["answer"]
    elif teacher == "both":
        log_attention = torch.maximum(shard["replay"], shard["answer"])
    else:
        raise SettingError("teacher", teacher, f"one of {', '.join(TEACHERS)}", "The default is 'replay'.")
    return log_attention.float().clamp(min=FLOOR)


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
