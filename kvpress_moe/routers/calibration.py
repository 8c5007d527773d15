"""One unit for all heads and layers: what an expert's opinion is worth in log attention, and an expert that learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """
    Turns ranks within a head into an estimate of the log of the attention that later queries will pay at most.

    An expert's rank r in (0, 1) becomes ``slope * r - tail * log(1 - r)``, with a slope and a tail for each head and
    expert: the tail tells the few best pairs apart, which a rank alone squeezes together. The gate's weights multiply
    these terms, and every head has an offset, so that heads and layers can compete for one budget.

    Parameters
    ----------
    num_heads : int
        KV heads H.
    num_experts : int
        E.
    """

    def __init__(self, num_heads: int, num_experts: int):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.tail = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.offset = nn.Parameter(torch.zeros(num_heads))

    def terms(self, ranks: Tensor, experts: Sequence[int]) -> Tensor:
        """What ranks (B, E, H, S) of some experts are worth, same shape; the gate has not weighed them yet."""
        slope, tail = (per_head.T[list(experts), :, None] for per_head in (self.slope, self.tail))  # (E, H, 1)
        return slope * ranks - tail * torch.log1p(-ranks)
