"""BaseMoERouter: a two-layer map from hidden states to a preference for every expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from kvpress_moe.budget.shared_bytes import POWER
from kvpress_moe.routers.calibration import Calibration
from kvpress_moe.routers.gate import gate, load_balance
from kvpress_moe.routers.learned_expert import LearnedExpert
from kvpress_moe.routers.strategy_rule import StrategyRule


@dataclass(frozen=True)
class RouterOutput:
    """
    What a router returns for the tokens it was given.

    Attributes
    ----------
    logits : Tensor, shape (B, S, E), float32
        Preference for every expert, cache feedback included.
    probs : Tensor, shape (B, S, E), float32
        Softmax of the logits.
    chosen : Tensor, shape (B, S, E), bool
        The experts that judge each token, after the capacity limit.
    weights : Tensor, shape (B, S, E), float32
        Routing weights. They are zero for experts that were not chosen, and sum to 1 for every token.
    aux_loss : Tensor, scalar
        ``sum_e mean_prob_e * usage_share_e``, not yet scaled by ``aux_loss_weight``.
    """

    logits: Tensor
    probs: Tensor
    chosen: Tensor
    weights: Tensor
    aux_loss: Tensor


class BaseMoERouter(nn.Module):
    """
    Two linear maps with a bottleneck, then softmax, top-k, and normalisation of the chosen weights.

    The second map starts at zero. So an untrained router prefers no expert, and ties go to the experts in turn (see
    :func:`kvpress_moe.routers.gate.preference_order`). The first map starts from a seed, so that two routers with the
    same settings have the same weights.

    Parameters
    ----------
    hidden_size : int
        Width C of the hidden states.
    num_experts : int
        Number of experts E.
    dropout : float, default=0.1
        Dropout between the two maps, in training mode only.
    bottleneck : int, default=32
        Width between the two maps.
    seed : int, default=0
        Seed of the first map.
    num_heads : int, default=0
        Number of KV heads H if the router is calibrated, which means trained to give scores of one unit. 0: not
        calibrated, ranks are averaged.
    learned : int, default=0
        Width of the expert ``"learned"`` inside this router. 0: the router has no such expert.
    num_seen : int, default=0
        Number of ranks of other experts that the expert ``"learned"`` sees.
    strategies : bool, default=False
        Whether the router also judges compression strategies, see
        :class:`kvpress_moe.routers.strategy_rule.StrategyRule`. Needs ``num_heads``.
    reach : int, default=0
        Distance in tokens from which scores decay, see :class:`kvpress_moe.routers.calibration.Calibration`. 0: never.
    """

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
    ):
        super().__init__()
        if strategies and not num_heads:
            raise ValueError("num_heads: got 0, expected the number of KV heads for routers that choose strategies.")
        # Not nn.Linear(...): its own initialisation would draw from the user's global generator.
        self.down = skip_init(nn.Linear, hidden_size, bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.up = skip_init(nn.Linear, bottleneck, num_experts)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5, generator=generator)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        self.calibration = Calibration(num_heads, num_experts, reach) if num_heads else None
        self.learned = LearnedExpert(hidden_size, learned, num_heads, seed, num_seen) if learned else None
        self.rule = StrategyRule(num_heads, bottleneck) if strategies else None

    def features(self, hidden_states: Tensor) -> Tensor:
        """What the router reads from hidden states (B, S, C): (B, S, bottleneck)."""
        hidden_states = hidden_states.to(self.down.weight.dtype)
        features: Tensor = self.dropout(F.silu(self.down(hidden_states)))
        return features

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Preference for every expert, shape (B, S, E), float32, from hidden states (B, S, C)."""
        logits: Tensor = self.up(self.features(hidden_states)).float()
        return logits

    def worths(self, hidden_states: Tensor) -> Tensor | None:
        """
        What losses of keys and of values are worth, (2, B, H, S), float32, from hidden states (B, S, C).

        None if the router was not trained to choose strategies.
        """
        return None if self.rule is None else self.rule.worths(self.features(hidden_states))

    @property
    def score_power(self) -> Tensor | float:
        """Evicting a pair with score s costs ``exp(score_power * s)``."""
        return POWER if self.rule is None else self.rule.powers[0]

    def forward(self, hidden_states: Tensor, top_k: int, capacity_factor: float) -> RouterOutput:
        """
        Route every token.

        Parameters
        ----------
        hidden_states : Tensor, shape (B, S, C)
            Input of the attention layer, for all tokens of a prompt or for its newest tokens only.
        top_k : int
            Experts per token.
        capacity_factor : float
            Limits the tokens per expert, see :func:`kvpress_moe.routers.gate.expert_capacity`.
        """
        logits = self.logits(hidden_states)
        decision = gate(logits, top_k, capacity_factor)
        return RouterOutput(logits, *decision, aux_loss=load_balance(decision.probs, decision.chosen))

    @torch.no_grad()
    def observe(self, hit_rates: Tensor) -> None:
        """Take note of the experts' hit rates, shape (E,), NaN where unknown. A base router ignores them."""
