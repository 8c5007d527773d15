"""StrategyRule: the part of a router that tells what each compression strategy would cost a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kvpress_moe.budget.shared_bytes import HIGHEST, POWER
from kvpress_moe.codes.distortion import Distortion
from kvpress_moe.codes.precision import Precision

_LEAST = 1e-30  # of a loss, so that its logarithm is finite


class StrategyRule(nn.Module):
    """
    A layer's logits over the strategies: minus the logarithm of what each of them costs a pair.

    To evict a pair with score s costs ``exp(p * s)``. To store it so that its key loses ``dk`` and its value ``dv``
    costs ``exp(p * s) * (exp(wk) * dk + exp(wv) * dv) ** q``. The powers p and q belong to the layer. The worths wk and
    wv are the sum of a part for the head and a part for the token and head, which the router reads from the hidden
    state. The losses are computed from the pair, see :class:`kvpress_moe.codes.distortion.Distortion`. So the rule
    serves any menu.

    A new rule has no worths and two equal powers: it is :func:`kvpress_moe.budget.shared_bytes.strategy_costs`.

    Parameters
    ----------
    num_heads : int
        Number of KV heads H.
    num_features : int
        Width of what the router reads from the hidden state.
    """

    def __init__(self, num_heads: int, num_features: int):
        super().__init__()
        self.powers = nn.Parameter(torch.full((2,), POWER))
        self.worth = nn.Parameter(torch.zeros(2, num_heads))
        self.read = skip_init(nn.Linear, num_features, 2 * num_heads, bias=False)
        nn.init.zeros_(self.read.weight)

    def worths(self, features: Tensor) -> Tensor:
        """Logarithms of what losses of keys and of values are worth, (2, B, H, S), from features (B, S, F)."""
        of_tokens = self.read(features.to(self.read.weight.dtype)).float()
        worths: Tensor = self.worth[:, None, :, None] + of_tokens.unflatten(-1, (2, -1)).permute(2, 0, 3, 1)
        return worths

    def log_costs(self, scores: Tensor, worths: Tensor, distortion: Distortion, menu: Sequence[Precision]) -> Tensor:
        """
        Logarithm of what each strategy costs each pair.

        Parameters
        ----------
        scores : Tensor, shape (B, H, S)
        worths : Tensor, shape (2, B, H, S)
            See :meth:`worths`.
        distortion : Distortion
        menu : sequence of M Precision

        Returns
        -------
        Tensor, shape (M + 1, B, H, S), float32
            The first strategy evicts. Minus infinity where nothing is lost.
        """
        score_power, loss_power = self.powers
        weights = score_power * scores.float().clamp(max=HIGHEST)
        of_keys, of_values = (
            {bits: worth + loss.clamp(min=_LEAST).log() for bits, loss in losses.items()}
            for worth, losses in zip(worths, (distortion.keys, distortion.values), strict=True)
        )
        nothing = torch.full_like(weights, -torch.inf)
        costs = [weights]
        for precision in menu:
            lost_key, lost_value = of_keys.get(precision.key_bits), of_values.get(precision.value_bits)
            if lost_key is None or lost_value is None:
                only = lost_value if lost_key is None else lost_key
                costs.append(nothing if only is None else weights + loss_power * only)
            else:
                costs.append(weights + loss_power * torch.logaddexp(lost_key, lost_value))
        return torch.stack(costs)
