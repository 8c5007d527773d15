"""
Attention over a PackedLayer by Triton kernels, for CUDA devices.

Each precision has a launch of its own, which decodes its pairs in registers: no decoded pair is written to memory. The
later tokens are a launch of the kernel for ragged layers, and that module's second kernel merges the tiles of each
head, whatever their precision. See :mod:`kvpress_moe.cache.triton_backend`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.packed_triton_kernels import attend_codes
from kvpress_moe.cache.tier import Tier
from kvpress_moe.cache.triton_backend import Work, check
from kvpress_moe.codes.bit_layout import bit_layout
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.transform_codes import TransformCodes, middles
from kvpress_moe.codes.vector_codes import VectorCodes
from kvpress_moe.codes.whole_vectors import WholeVectors

MEANS_AT_ONCE = 2**26  # limit of the products of queries and means in memory: 256 MiB


def block_of_codes(block_d: int) -> int:
    """Number of coded pairs of a block. Numbers that are being decoded take registers, so it is small."""
    return max(16, 2048 // block_d)


def packed_triton_attention(query: Tensor, layer: PackedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """
    Computes what :func:`kvpress_moe.cache.packed_attention.packed_attention` computes, with Triton kernels.

    Decoded keys and values, and queries in the basis of the codes, are rounded to the query's dtype. Sums are float32.

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
    n_batch, n_kv_heads = layer.new_keys.shape[:2]
    queries = work.query.reshape(n_batch * n_kv_heads, work.n_rows, -1).float() * scaling  # (B·H, G·Q, D)
    heads = torch.arange(len(queries), device=query.device) % n_kv_heads
    for tier, tiles in zip(layer.tiers, tiling.tiles, strict=True):
        if len(tiles):
            _attend(work, layer, tier, tiles, queries, heads, partial, weights)
    empty = layer.new_keys.new_empty(0, query.shape[-1])
    no_tiles = tiling.first_tiles.new_empty(0, 3)
    work.attend(empty, empty, no_tiles, partial[n_tiles:], weights[n_tiles:])
    return work.merge(tiling.first_tiles, partial, weights)


def _attend(
    work: Work,
    layer: PackedPairs,
    tier: Tier,
    tiles: Tensor,
    queries: Tensor,
    heads: Tensor,
    partial: Tensor,
    weights: Tensor,
) -> None:
    """Launch the kernel for the pairs of one precision; with means, for as many queries as memory allows."""
    keys, values, basis = tier.keys, tier.values, layer.basis
    device, head_dim = queries.device, queries.shape[-1]
    turn = rotation(head_dim, device)
    nothing = turn.new_empty(0)
    n_rows, n_positions = queries.shape[1], 0
    key_scales = key_zeros = middle = positions = key_layout = nothing
    asked, planes = queries, 0
    if isinstance(keys, TransformCodes):
        assert basis is not None
        asked, _ = basis.for_codes(basis.query_coefficients(queries, heads), keys.bits)
        middle, positions, key_scales = middles(head_dim, keys.bits, device), keys.position, keys.gain
        key_layout = bit_layout(keys.groups, device)
        n_positions = basis.n_positions
    elif isinstance(keys, VectorCodes):
        asked = queries @ turn
        key_scales, key_zeros = keys.scale, keys.zero
        key_layout = bit_layout(keys.groups, device)
    planes = len(key_layout)
    value_scales = value_zeros = value_layout = nothing
    if isinstance(values, VectorCodes):
        value_scales, value_zeros = values.scale, values.zero
        value_layout = bit_layout(values.groups, device)
    asked = asked.to(work.query.dtype).contiguous()
    key_data = keys.vectors if isinstance(keys, WholeVectors) else keys.packed
    value_data = values.vectors if isinstance(values, WholeVectors) else values.packed
    block_d, block_rows, _ = work.blocks
    at_once = n_rows if not n_positions else max(1, MEANS_AT_ONCE // (len(queries) * n_positions))
    for first in range(0, n_rows, at_once):
        end = min(first + at_once, n_rows)
        means = nothing
        if n_positions:
            assert basis is not None
            means = basis.mean_logits(queries[:, first:end], heads).contiguous()
        with torch.cuda.device_of(queries):
            attend_codes[(len(tiles), triton.cdiv(end - first, block_rows))](
                asked,
                means,
                key_data,
                key_scales,
                key_zeros,
                middle,
                positions,
                key_layout,
                value_data,
                value_scales,
                value_zeros,
                value_layout,
                tiles,
                partial,
                weights,
                sum(map(sum, tier.lengths)),
                n_rows,
                first,
                end,
                n_positions,
                work.cap or 0.0,
                CHANNELS=asked.shape[-1],
                HEAD_DIM=head_dim,
                KEY_PLANES=planes,
                VALUE_PLANES=len(value_layout),
                MEANS=n_positions > 0,
                CAPPED=work.cap is not None,
                BLOCK_C=max(16, triton.next_power_of_2(asked.shape[-1])),
                BLOCK_D=block_d,
                BLOCK_ROWS=block_rows,
                BLOCK_PAIRS=block_of_codes(block_d),
            )
    if isinstance(values, VectorCodes):
        places = tiles[:, 3].long()
        partial[places] = partial[places] @ turn.T
