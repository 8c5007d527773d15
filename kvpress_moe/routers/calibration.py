"""Calibration: experts' ranks become log attention, which is one unit for all heads and layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """
    Turns ranks within a head into an estimate of log attention: the largest that later queries will pay to a pair.

    An expert's rank r in (0, 1) becomes ``slope * r - tail * log(1 - r)``, with one slope and one tail for each head
    and expert. The tail tells the few best pairs apart, because their ranks are all close to 1. The gate's weights
    multiply these terms. Every head has an offset, so that heads and layers can compete for one budget.

    Parameters
    ----------
    num_heads : int
        Number of KV heads H.
    num_experts : int
        Number of experts E.
    """

    def __init__(self, num_heads: int, num_experts: int):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.tail = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.offset = nn.Parameter(torch.zeros(num_heads))

    def terms(self, ranks: Tensor, experts: Sequence[int]) -> Tensor:
        """Calibrated terms of the ranks (B, E, H, S) of some experts, same shape, without the gate's weights."""
        slope, tail = (per_head.T[list(experts), :, None] for per_head in (self.slope, self.tail))  # (E, H, 1)
        return slope * ranks - tail * torch.log1p(-ranks)
