"""PackedLayer: a ragged layer whose pairs are stored as codes, each with the precision that was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.cache.tier import Tier, Vectors
from kvpress_moe.codes.exact import exact
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.precision import WHOLE, Precision
from kvpress_moe.codes.transform_codes import TRANSFORM_BITS, encode_coefficients
from kvpress_moe.codes.vector_codes import encode
from kvpress_moe.codes.whole_vectors import WholeVectors
from kvpress_moe.errors import UnsupportedInputError

# B = batch, H = KV heads, S = tokens of the prompt, D = head dim


class PackedLayer(PackedPairs, RaggedLayer):
    """
    One layer whose heads keep different numbers of pairs, bit-packed by precision.

    The pairs of one precision are together in a :class:`~kvpress_moe.cache.tier.Tier`. Later tokens are dense, shape
    (B, H, T, D), and stay as the model wrote them.

    :mod:`kvpress_moe.cache.packed_attention` computes attention over it. It decodes blocks of pairs, one after the
    other, so no dense copy of the layer is made.

    Parameters
    ----------
    tiers : sequence of Tier
        At least one, all of the same batch and heads.
    basis : KeyBasis or None
        Basis of the keys that are transform codes. None if there are none.
    n_read : int
        Number of tokens that the pairs were chosen from.
    head_dim : int
    dtype : torch.dtype
        Type of the keys and values that the model writes.
    device : torch.device
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        basis: KeyBasis | None,
        n_read: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self._begin(n_read, dtype, torch.device(device))
        self._hold_tiers(tiers, basis, head_dim, dtype, device)

    @classmethod
    def from_strategies(
        cls,
        keys: Tensor,
        values: Tensor,
        strategies: Tensor,
        menu: Sequence[Precision],
        basis: KeyBasis | None = None,
        positions: Tensor | None = None,
    ) -> PackedLayer:
        """
        Encode pairs, each with its own precision.

        Parameters
        ----------
        keys, values : Tensor, shape (B, H, S, D)
        strategies : Tensor, shape (B, H, S), whole numbers
            0 evicts a pair. ``m`` stores it with ``menu[m - 1]``.
        menu : sequence of Precision
        basis : KeyBasis, optional
            With a basis, keys of few bits become transform codes.
        positions : Tensor, shape (B or 1, S), int64, optional
            Positions of the keys, as the rotary embedding got them. Needed with a basis. By default 0 to S - 1.

        Raises
        ------
        UnsupportedInputError
            If a position is negative, or outside of the basis.
        """
        with exact(keys.device):
            return cls._coded(keys, values, strategies, menu, basis, positions)

    @classmethod
    def _coded(
        cls,
        keys: Tensor,
        values: Tensor,
        strategies: Tensor,
        menu: Sequence[Precision],
        basis: KeyBasis | None,
        positions: Tensor | None,
    ) -> PackedLayer:
        dtype = min(keys.dtype, values.dtype, key=lambda dtype: dtype.itemsize)  # autocast may leave keys in float32
        keys, values = keys.to(dtype), values.to(dtype)
        if positions is None:
            positions = torch.arange(keys.shape[2], device=keys.device)[None]
        positions = positions.to(keys.device)
        if basis is not None:
            _check_positions(positions, basis.n_positions)
        coefficients = None if basis is None else basis.coefficients(keys, positions)
        positions = positions[:, None].expand(strategies.shape)
        tiers: list[Tier] = []
        for number, precision in enumerate(menu, start=1):
            chosen = strategies == number
            lengths = chosen.sum(-1).tolist()
            if not any(map(any, lengths)) and (number < len(menu) or tiers):
                continue  # at least one tier, even if every pair is evicted
            bits = precision.key_bits
            coded_keys: Vectors
            if coefficients is not None and basis is not None and bits in TRANSFORM_BITS:
                coded_keys = encode_coefficients(coefficients[chosen], positions[chosen], bits, basis.n_positions)
            else:
                coded_keys = _coded(keys[chosen], bits)
            tiers.append(Tier(precision, coded_keys, _coded(values[chosen], precision.value_bits), lengths))
        return cls(tiers, basis, keys.shape[2], keys.shape[3], dtype, keys.device)

    def _move(self, device: torch.device | str) -> None:
        self._forget_derived()
        self.tiers = [tier.to(device) for tier in self.tiers]
        self.basis = None if self.basis is None else self.basis.to(device)
        self.new_keys = self.new_keys.to(device, non_blocking=True)
        self.new_values = self.new_values.to(device, non_blocking=True)


def _check_positions(positions: Tensor, n_positions: int) -> None:
    if not positions.numel():
        return
    low, high = (int(end) for end in positions.aminmax())
    if low < 0 or high >= n_positions:
        raise UnsupportedInputError(
            f"positions: got {low} to {high}, expected 0 to {n_positions - 1}, for which the key basis was made. Count "
            "positions from 0, or make the basis for more of them."
        )


def _coded(vectors: Tensor, bits: int) -> Vectors:
    return WholeVectors(vectors) if bits == WHOLE else encode(vectors, bits)
