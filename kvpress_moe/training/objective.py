"""What a router is asked to predict, and how a wrong prediction is weighed."""

from __future__ import annotations

import torch
from torch import Tensor

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
