"""PiKVMoERouter: a router that uses the hit rates of the experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kvpress_moe.routers.base import BaseMoERouter


class PiKVMoERouter(BaseMoERouter):
    """
    :class:`BaseMoERouter` plus cache feedback.

    Every expert has a running average of its hit rate. Experts above the mean of the known rates get more tokens in the
    next routing. This uses multiplicative weights: an expert's probability is multiplied by
    ``exp(feedback_strength * (rate - mean))``, then the probabilities are normalised again. A learned map of the same
    deviations is added to the logits. It starts at zero and changes in training only. The idea to feed cache hits back
    into a router is from PiKV (arXiv 2508.06526).

    Parameters
    ----------
    cache_aware : bool, default=True
        ``False`` switches the feedback off. Then the router behaves exactly like a :class:`BaseMoERouter`.
    feedback_strength : float, default=4.0
        Step size of the multiplicative weights.
    momentum : float, default=0.9
        Weight of the old average when a new hit rate is observed.
    """

    hit_rate: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        dropout: float = 0.1,
        bottleneck: int = 32,
        seed: int = 0,
        num_heads: int = 0,
        learned: int = 0,
        num_seen: int = 0,
        strategies: bool = False,
        reach: int = 0,
        cache_aware: bool = True,
        feedback_strength: float = 4.0,
        momentum: float = 0.9,
    ):
        shape = (hidden_size, num_experts, dropout, bottleneck, seed, num_heads, learned, num_seen, strategies, reach)
        super().__init__(*shape)
        self.cache_aware = cache_aware
        self.feedback_strength = feedback_strength
        self.momentum = momentum
        self.adjust = skip_init(nn.Linear, num_experts, num_experts, bias=False)
        nn.init.zeros_(self.adjust.weight)
        self.register_buffer("hit_rate", torch.full((num_experts,), torch.nan))

    def logits(self, hidden_states: Tensor) -> Tensor:
        logits = super().logits(hidden_states)
        return logits + self.feedback() if self.cache_aware else logits

    def feedback(self) -> Tensor:
        """What the hit rates add to the logits, shape (E,). An unknown rate counts as equal to the mean."""
        deviation = (self.hit_rate - self.hit_rate.nanmean()).nan_to_num(0.0)  # (E,)
        adjustment: Tensor = self.adjust(deviation.to(self.adjust.weight.dtype)).float()
        return self.feedback_strength * deviation + adjustment

    @torch.inference_mode(False)  # the averages are also used outside inference mode
    @torch.no_grad()
    def observe(self, hit_rates: Tensor) -> None:
        """
        Move the running averages towards ``hit_rates``, shape (E,). NaN leaves an expert's average unchanged.

        New tensors are made, because a process that the router was sent to may share the memory of the old ones.
        """
        if not self.cache_aware:
            return
        hit_rates = hit_rates.to(self.hit_rate)
        moved = self.momentum * self.hit_rate + (1 - self.momentum) * hit_rates
        moved = torch.where(self.hit_rate.isnan(), hit_rates, moved)
        self.hit_rate = torch.where(hit_rates.isnan(), self.hit_rate, moved)
