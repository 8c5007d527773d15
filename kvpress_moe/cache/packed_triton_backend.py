"""
Attention over a PackedLayer by Triton kernels, for CUDA devices.

Each precision has a launch of its own, which decodes block by block: no decoded pair is written to memory. The later
tokens are a launch of the kernel for ragged layers, and that module's second kernel merges the tiles of each head,
whatever their precision. See :mod:`kvpress_moe.cache.triton_backend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.packed_triton_kernels import attend_codes
from kvpress_moe.cache.tier import Tier
from kvpress_moe.cache.triton_backend import Work, check
from kvpress_moe.codes.bit_layout import bit_layout
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.transform_codes import TransformCodes, middles, steps
from kvpress_moe.codes.vector_codes import VectorCodes
from kvpress_moe.codes.whole_vectors import WholeVectors

MEANS_AT_ONCE = 2**26  # limit of the products of queries and means in memory: 256 MiB


def block_of_codes(block_d: int) -> int:
    """Number of coded pairs of a block. Numbers that are being decoded take registers, so it is small."""
    return max(16, 2048 // block_d)


def packed_triton_attention(query: Tensor, layer: PackedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """
    Computes what :func:`kvpress_moe.cache.packed_attention.packed_attention` computes, with Triton kernels.

    Queries in the basis of the codes, and decoded values, are rounded to the query's dtype. Keys are not decoded: the
    numbers of a code are exact in all types. Sums are float32.

    Raises
    ------
    UnsupportedInputError
        As :func:`kvpress_moe.cache.triton_backend.triton_attention`.
    """
    check(query, layer)
    work = Work.of(query, layer, scaling, cap)
    tiling = layer.packed_tiling(work.tile_size)
    n_tiles = sum(map(len, tiling.tiles))
    partial, weights = work.parts(n_tiles)
    n_batch, n_kv_heads, head_dim = layer.new_keys.shape[0], layer.new_keys.shape[1], query.shape[-1]
    queries = work.query.reshape(n_batch * n_kv_heads, work.n_rows, head_dim).float() * scaling  # (B·H, G·Q, D)
    heads = torch.arange(len(queries), device=query.device) % n_kv_heads
    turn = rotation(head_dim, query.device)
    transformed = any(isinstance(tier.keys, TransformCodes) for tier in layer.tiers)
    basis = layer.basis if transformed else None
    coefficients = None if basis is None else basis.query_coefficients(queries, heads)
    asked = _Asked(queries, queries @ turn, coefficients)
    at_once = work.n_rows if basis is None else max(1, MEANS_AT_ONCE // (len(queries) * basis.n_positions))
    for first in range(0, work.n_rows, at_once):
        rows = range(first, min(first + at_once, work.n_rows))
        means = None
        if basis is not None:
            means = basis.mean_logits(queries[:, rows.start : rows.stop], heads).contiguous()
        for tier, tiles in zip(layer.tiers, tiling.tiles, strict=True):
            if len(tiles):
                _attend(work, tier, tiles, *asked.of(tier, query.dtype), means, rows, partial, weights)
    for tier, tiles in zip(layer.tiers, tiling.tiles, strict=True):
        if isinstance(tier.values, VectorCodes) and len(tiles):
            places = tiles[:, 3].long()
            partial[places] = partial[places] @ turn.T
    empty = layer.new_keys.new_empty(0, head_dim)
    no_tiles = tiling.first_tiles.new_empty(0, 3)
    work.attend(empty, empty, no_tiles, partial[n_tiles:], weights[n_tiles:])
    return work.merge(tiling.first_tiles, partial, weights)


@dataclass(frozen=True)
class _Asked:
    """The queries (B·H, G·Q, D) as they are, turned as vector codes are, and as coefficients of transform codes."""

    queries: Tensor
    turned: Tensor
    coefficients: Tensor | None

    def of(self, tier: Tier, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """
        Queries (B·H, G·Q, C) for a tier's numbers, rounded, and their constants (B·H, G·Q), float32.

        The constants are made from rounded queries, because numbers are far from zero: errors of the rounding cancel.
        """
        keys = tier.keys
        if isinstance(keys, WholeVectors):
            return self.queries.to(dtype), self.queries[..., 0]  # constants are not used
        if isinstance(keys, VectorCodes):
            rounded = self.turned.to(dtype)
            return rounded, rounded.float().sum(-1) * -keys.middle
        assert self.coefficients is not None
        of_bits = steps(keys.head_dim, keys.bits, self.queries.device)
        rounded = (self.coefficients[..., : len(of_bits)] * of_bits).to(dtype)
        return rounded, -(rounded.float() @ middles(keys.head_dim, keys.bits, self.queries.device))


def _attend(
    work: Work,
    tier: Tier,
    tiles: Tensor,
    asked: Tensor,
    constants: Tensor,
    means: Tensor | None,
    rows: range,
    partial: Tensor,
    weights: Tensor,
) -> None:
    """Launch the kernel for the pairs of one precision and some of the queries."""
    keys, values, device = tier.keys, tier.values, asked.device
    nothing = constants.new_empty(0)
    key_scales, positions, key_layout, key_middle = nothing, nothing, nothing, 1.0
    with_means = isinstance(keys, TransformCodes)
    if isinstance(keys, TransformCodes):
        positions, key_scales, key_layout = keys.position, keys.gain, bit_layout(keys.groups, device)
    elif isinstance(keys, VectorCodes):
        key_scales, key_layout, key_middle = keys.reach, bit_layout(keys.groups, device), keys.middle
    value_scales, value_layout, value_middle = nothing, nothing, 1.0
    if isinstance(values, VectorCodes):
        value_scales, value_layout, value_middle = values.reach, bit_layout(values.groups, device), values.middle
    block_d, block_rows, _ = work.blocks
    with torch.cuda.device_of(asked):
        attend_codes[(len(tiles), triton.cdiv(len(rows), block_rows))](
            asked.contiguous(),
            constants.contiguous(),
            nothing if means is None else means,
            keys.vectors if isinstance(keys, WholeVectors) else keys.packed,
            key_scales,
            positions,
            key_layout,
            values.vectors if isinstance(values, WholeVectors) else values.packed,
            value_scales,
            value_layout,
            tiles,
            partial,
            weights,
            sum(map(sum, tier.lengths)),
            work.n_rows,
            rows.start,
            rows.stop,
            0 if means is None else means.shape[-1],
            work.cap or 0.0,
            key_middle,
            value_middle,
            CHANNELS=asked.shape[-1],
            HEAD_DIM=work.query.shape[-1],
            KEY_PLANES=len(key_layout),
            VALUE_PLANES=len(value_layout),
            MEANS=with_means,
            CAPPED=work.cap is not None,
            BLOCK_C=max(16, triton.next_power_of_2(asked.shape[-1])),
            BLOCK_D=block_d,
            BLOCK_ROWS=block_rows,
            BLOCK_PAIRS=block_of_codes(block_d),
        )
