"""The built-in window experts: each keeps a share of the first tokens and a share of the last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_moe.experts.layer_call import LayerCall

WINDOWS = {  # name: (share of first tokens, share of last tokens)
    "aggressive": (0.2, 0.1),
    "moderate": (0.3, 0.2),
    "conservative": (0.5, 0.3),
    "ultra_aggressive": (0.1, 0.05),
}


def window_scores(k_len: int, first: float, last: float, device: torch.device | None = None) -> Tensor:
    """
    How deep each position lies inside the window: ``-min(i / (first·S), (S-1-i) / (last·S))``, shape (S,), float32.

    The best ``(first + last)·S`` scores are exactly the window. With another budget it shrinks or grows in proportion.
    """
    position = torch.arange(k_len, device=device, dtype=torch.float32)
    return -torch.minimum(position / (first * k_len), (k_len - 1 - position) / (last * k_len))


def rule_by_length(k_len: int) -> str:
    """The length rule: conservative below 100 tokens, moderate up to 500, aggressive above."""
    if k_len < 100:
        return "conservative"
    return "moderate" if k_len <= 500 else "aggressive"


def score_window(call: LayerCall, name: str) -> Tensor:
    """Scores (B, H, S) of the window called ``name``. ``"adaptive"`` takes the window that the length rule selects."""
    name = rule_by_length(call.k_len) if name == "adaptive" else name
    scores = window_scores(call.k_len, *WINDOWS[name], device=call.keys.device)
    return scores.expand(*call.keys.shape[:3])


def window_keep_fraction(name: str, k_len: int) -> float:
    """Share of the tokens inside the window: 0.30, 0.50, 0.80 or 0.15. ``"adaptive"`` follows the length rule."""
    return round(sum(WINDOWS[rule_by_length(k_len) if name == "adaptive" else name]), 2)
