"""LearnedExpert: the part of a router that computes importance from the hidden states."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init


class LearnedExpert(nn.Module):
    """
    An expert that computes importance from the hidden state, an idea of KVzap (arXiv 2601.07891): C -> width -> H.

    It may also see how the other experts rank the token in every head. So it can learn which of them to follow when.

    Parameters
    ----------
    hidden_size : int
        Width C of the hidden states.
    width : int
        Width between the two maps.
    num_heads : int
        Number of KV heads H.
    seed : int
        Seed of the first map.
    num_seen : int, default=0
        Number of ranks that it sees beside the hidden state: H times the number of other experts.
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
        if self.num_seen:  # two maps are added, which saves joining hidden states and ranks in one tensor
            given = cast(Tensor, ranks)
            seen = torch.cat((given - 0.5, torch.log1p(-given) + 1), dim=-1)  # both of mean zero
            inside = inside + F.linear(seen.to(weight.dtype), weight[:, width:])
        importance: Tensor = self.up(F.silu(inside)).float()
        return importance

    def importance(self, hidden_states: Tensor, ranks: Tensor | None) -> Tensor:
        """
        Log importance of every pair.

        Parameters
        ----------
        hidden_states : Tensor, shape (B, S, C)
        ranks : Tensor, shape (B, other experts, H, S), or None
            Ranks within the head by the other experts. Not used if this expert sees none.

        Returns
        -------
        Tensor, shape (B, H, S), float32
        """
        seen = cast(Tensor, ranks).flatten(1, 2).transpose(1, 2) if self.num_seen else None  # (B, S, E·H)
        importance: Tensor = self(hidden_states, seen)
        return importance.transpose(1, 2)
