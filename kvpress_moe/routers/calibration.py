"""One unit for all heads and layers: what an expert's opinion is worth in log attention, and an expert that learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init


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


class LearnedExpert(nn.Module):
    """
    An expert that reads importance off the hidden state, the idea of KVzap (arXiv 2601.07891): C -> width -> H.

    It may also see how the other experts rank the token in every head, and so learn when to believe whom.

    Parameters
    ----------
    hidden_size : int
        C.
    width : int
    num_heads : int
        KV heads H.
    seed : int
    num_seen : int, default=0
        Ranks that it sees beside the hidden state: H times the number of other experts.
    """

    def __init__(self, hidden_size: int, width: int, num_heads: int, seed: int = 0, num_seen: int = 0):
        super().__init__()
        self.num_seen = num_seen
        self.down = skip_init(nn.Linear, hidden_size + 2 * num_seen, width)
        self.up = skip_init(nn.Linear, width, num_heads)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5, generator=generator)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor, ranks: Tensor | None = None) -> Tensor:
        """Log importance (…, H) of tokens with hidden states (…, C) and ranks (…, num_seen) in (0, 1)."""
        weight = self.down.weight
        width = hidden_states.shape[-1]
        inside = F.linear(hidden_states.to(weight.dtype), weight[:, :width], self.down.bias)
        if self.num_seen:  # a sum of two maps, so that hidden states need not be copied beside the ranks
            given = cast(Tensor, ranks)
            seen = torch.cat((given - 0.5, torch.log1p(-given) + 1), dim=-1)  # both of mean zero
            inside = inside + F.linear(seen.to(weight.dtype), weight[:, width:])
        importance: Tensor = self.up(F.silu(inside)).float()
        return importance
