"""Calibration: experts' ranks become log attention, which is one unit for all heads and layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

UNIT = 1024  # tokens; decays are nats per this distance


class Calibration(nn.Module):
    """
    Turns ranks within a head into an estimate of log attention: the largest that later queries will pay to a pair.

    An expert's rank r in (0, 1) becomes ``slope * r - tail * log(1 - r)``, with one slope and one tail for each head
    and expert. The tail tells the few best pairs apart, because their ranks are all close to 1. The gate's weights
    multiply these terms. Every head has an offset, so that heads and layers can compete for one budget.

    Attention falls with distance, at a rate that each head has for itself. Prompts of training show this only up to
    their own length. So the score of a pair that is further than ``reach`` from the prompt's end also falls by the
    head's *decay*, evenly with the distance beyond.

    Parameters
    ----------
    num_heads : int
        Number of KV heads H.
    num_experts : int
        Number of experts E.
    reach : int, default=0
        Distance in tokens from which scores decay. 0: they never do, and there are no decays.
    """

    def __init__(self, num_heads: int, num_experts: int, reach: int = 0):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.tail = nn.Parameter(torch.zeros(num_heads, num_experts))
        self.offset = nn.Parameter(torch.zeros(num_heads))
        self.reach = reach
        self.decay = nn.Parameter(torch.zeros(num_heads)) if reach else None

    def terms(self, ranks: Tensor, experts: Sequence[int]) -> Tensor:
        """Calibrated terms of the ranks (B, E, H, S) of some experts, same shape, without the gate's weights."""
        slope, tail = (per_head.T[list(experts), :, None] for per_head in (self.slope, self.tail))  # (E, H, 1)
        return slope * ranks - tail * torch.log1p(-ranks)

    def fading(self, distances: Tensor) -> Tensor | None:
        """
        How much lower pairs score because of their distance, in nats.

        Parameters
        ----------
        distances : Tensor, shape (B or 1, S)
            How many tokens come after each pair.

        Returns
        -------
        Tensor, shape (B or 1, H, S), float32, or None
            None if scores never decay.
        """
        if self.decay is None:
            return None
        beyond = (distances - self.reach).clamp(min=0) / UNIT
        fading: Tensor = self.decay.float()[:, None] * beyond[:, None]
        return fading
