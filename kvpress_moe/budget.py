"""How many KV pairs each head of a layer keeps. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def mixed_keep_fraction(usage: Sequence[float], keep_fractions: Sequence[float]) -> float:
    """
    What the experts keep when their own fractions decide: ``sum_e usage_share_e * keep_fraction_e``.

    Parameters
    ----------
    usage : sequence of E numbers
        Tokens routed to each expert; only their shares matter.
    keep_fractions : sequence of E floats
        Each expert's own fraction, in [0, 1].
    """
    return sum(count * keep for count, keep in zip(usage, keep_fractions, strict=True)) / sum(usage)


def pairs_kept(k_len: int, keep_fraction: float) -> int:
    """
    Pairs kept of ``k_len`` at ``keep_fraction``: at least 1, at most all.

    The same truncation as :func:`kvpress.utils.compute_n_kept`, for a fraction that is kept instead of removed.
    """
    return max(1, min(k_len, int(k_len * keep_fraction)))
