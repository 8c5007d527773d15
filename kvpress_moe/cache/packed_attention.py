"""Attention over a PackedLayer in plain PyTorch: blocks of pairs are decoded one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.tier import Tier, Vectors
from kvpress_moe.cache.torch_backend import newest_logits, torch_attention
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.transform_codes import TransformCodes
from kvpress_moe.codes.whole_vectors import WholeVectors
from kvpress_moe.model.attention import apply_softcap

BLOCK = 8192  # pairs that are decoded at once; they stay in the processor's cache
LOGITS_AT_ONCE = 2**21  # limit of the logits in memory: 8 MiB, and a few temporary tensors of that size

# R = some neighbouring rows and heads, Q = queries of a head, n = pairs

Part = tuple[int, slice, slice]  # head, its place in a block, its place among the head's pairs of the tier


class Products:
    """
    How codes of one tier are multiplied: in plain PyTorch. Blocks of pairs are unpacked, then multiplied head by head.

    All tensors are float32. Results go into tensors that all tiers share, so that none has to be copied.
    """

    def key_logits(
        self,
        keys: Vectors,
        starts: Sequence[int],
        asked: Tensor,
        constants: Tensor,
        means: Tensor | None,
        offsets: Sequence[int],
        logits: Tensor,
    ) -> None:
        """
        Write the logits of R neighbouring heads.

        Parameters
        ----------
        keys : VectorCodes, TransformCodes or WholeVectors
            Of a tier.
        starts : sequence of R + 1 int
            Where the pairs of the heads start in the tier, and where the last one ends.
        asked, constants : Tensor, shape (R, Q, C), (R, Q)
            Queries in the basis of the keys, and what belongs to them.
        means : Tensor or None, shape (R, Q, n_positions)
            Products of the queries with the means of transform codes.
        offsets : sequence of R int
            Where the logits of each head's pairs start in ``logits``.
        logits : Tensor, shape (R, Q, n)
        """
        for start, stop, parts in _blocks(starts):
            block = _Block.of(keys, start, stop)
            for head, here, there in parts:
                place = logits[head, :, offsets[head] + there.start : offsets[head] + there.stop]
                torch.mm(asked[head], block.numbers[:, here], out=place)
                if block.scale is None:
                    continue
                if block.zero is not None:  # scale * (query · numbers) + zero * (sum of the query)
                    place.mul_(block.scale[here]).addr_(constants[head], block.zero[here])
                elif means is not None and block.positions is not None:
                    place.add_(constants[head, :, None]).mul_(block.scale[here])
                    place += means[head].index_select(-1, block.positions[here])

    def value_sums(
        self,
        values: Vectors,
        starts: Sequence[int],
        weights: Tensor,
        offsets: Sequence[int],
        whole: Tensor,
        rotated: Tensor,
        zeros: Tensor,
    ) -> None:
        """
        Add the weighted values of R neighbouring heads.

        Parameters
        ----------
        values : VectorCodes or WholeVectors
            Of a tier.
        starts, offsets : sequence of int
            As for :meth:`key_logits`.
        weights : Tensor, shape (R, Q, n + T)
            Attention weights of pairs and later tokens.
        whole, rotated, zeros : Tensor, shape (R, Q, D), (R, Q, D), (R, Q)
            Sums of whole values; of coded ones, which are rotated; and of their zeros.
        """
        for start, stop, parts in _blocks(starts):
            block = _Block.of(values, start, stop)
            for head, here, there in parts:
                place = weights[head, :, offsets[head] + there.start : offsets[head] + there.stop]
                if block.scale is None or block.zero is None:
                    whole[head].addmm_(place, block.numbers[:, here].T)
                else:
                    rotated[head].addmm_(place * block.scale[here], block.numbers[:, here].T)
                    zeros[head].addmv_(place, block.zero[here])


TORCH = Products()


def packed_attention(
    query: Tensor, layer: PackedPairs, scaling: float, cap: float | None = None, products: Products = TORCH
) -> Tensor:
    """
    Attention of the newest tokens over a packed layer. Each sees all kept pairs, and the later tokens up to itself.

    Queries are transformed as the codes are, and the output is transformed back, so pairs never are. Scales and zeros
    apply to logits and weights, which are fewer than the channels of the pairs. Everything is computed in float32. If
    a gradient is needed, the layer is decoded as a whole.

    Parameters, result: as :func:`kvpress_moe.cache.torch_backend.torch_attention`. ``products`` multiplies codes.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, layer.new_keys, layer.new_values)):
        return torch_attention(query, layer, scaling, cap)
    n_batch, num_heads, q_len, head_dim = query.shape
    grouped, new_logits = newest_logits(query, layer, scaling, cap)  # (B·H, G·Q, D), (B·H, G·Q, T)
    output = torch.empty(grouped.shape, dtype=torch.float32, device=query.device)
    new_values = layer.new_values.flatten(0, 1)
    width = max(map(max, layer.lengths)) + new_logits.shape[2]
    if layer.basis is not None:
        width = max(width, layer.basis.n_positions)
    n_rows = max(1, min(grouped.shape[1], LOGITS_AT_ONCE // width))
    n_heads = max(1, LOGITS_AT_ONCE // (n_rows * width))
    starts = [tier.starts() for tier in layer.tiers]
    for first in range(0, len(grouped), n_heads):
        heads = slice(first, min(first + n_heads, len(grouped)))
        own = [at[first : heads.stop + 1] for at in starts]
        for row in range(0, grouped.shape[1], n_rows):
            rows = slice(row, row + n_rows)
            output[heads, rows] = _attend(
                grouped[heads, rows].float(),
                new_logits[heads, rows],
                new_values[heads],
                layer,
                own,
                first,
                cap,
                products,
            )
    return output.to(query.dtype).view(n_batch, num_heads, q_len, head_dim).transpose(1, 2)


def _attend(
    queries: Tensor,
    new_logits: Tensor,
    new_values: Tensor,
    layer: PackedPairs,
    starts: list[list[int]],
    first: int,
    cap: float | None,
    products: Products,
) -> Tensor:
    """The output (R, Q, D), float32, of R neighbouring heads from ``first`` on, whose pairs start at ``starts``."""
    n_heads = len(queries)
    ends = [list(ends) for ends in zip(*(_lengths(at) for at in starts), strict=True)]  # by head: pairs of each tier
    offsets = [[sum(own[:tier]) for own in ends] for tier in range(len(starts))]
    longest = max(map(sum, ends))
    heads = torch.arange(first, first + n_heads, device=queries.device) % len(layer.lengths[0])
    logits = torch.full((*queries.shape[:2], longest), -torch.inf, device=queries.device)
    transformed = any(isinstance(tier.keys, TransformCodes) for tier in layer.tiers)
    means = coefficients = None
    if layer.basis is not None and transformed:
        means = layer.basis.mean_logits(queries, heads)
        coefficients = layer.basis.query_coefficients(queries, heads)
    turned = queries @ rotation(queries.shape[-1], queries.device)
    for tier, at, offset in zip(layer.tiers, starts, offsets, strict=True):
        asked, constants = _in_basis_of(tier, queries, turned, coefficients)
        products.key_logits(tier.keys, at, asked, constants, means, offset, logits)
    del means
    if cap is not None:
        logits = torch.where(logits == -torch.inf, logits, apply_softcap(logits, cap))
    weights = torch.cat((logits, new_logits), dim=-1).softmax(dim=-1)
    del logits
    rotated, zeros = queries.new_zeros(queries.shape), queries.new_zeros(queries.shape[:2])
    whole = weights[..., longest:] @ new_values.float()
    for tier, at, offset in zip(layer.tiers, starts, offsets, strict=True):
        products.value_sums(tier.values, at, weights, offset, whole, rotated, zeros)
    turn = rotation(queries.shape[-1], queries.device)
    return whole + (rotated + zeros[..., None]) @ turn.T


def packed_attention_together(
    query: Tensor, layers: Sequence[PackedPairs], scaling: float, cap: float | None = None, products: Products = TORCH
) -> Tensor:
    """
    Attention of one new token of each of several layers, each over its own layer.

    What does not depend on a layer's pairs is computed for all layers at once. For the small caches of a server this
    takes most of the time.

    Parameters
    ----------
    query : Tensor, shape (N, num_heads, 1, D)
    layers : sequence of N PackedPairs
        Of one row each, with the same key transform.
    scaling, cap, products
        As in :func:`packed_attention`.

    Returns
    -------
    Tensor, shape (N, 1, num_heads, D)
    """
    n_heads, device = layers[0].new_keys.shape[1], query.device
    queries = (query.unflatten(1, (n_heads, -1)).squeeze(3) * scaling).flatten(0, 1).float()  # (N·H, G, D)
    places = [slice(first, first + n_heads) for first in range(0, len(queries), n_heads)]
    heads = torch.arange(n_heads, device=device).repeat(len(layers))
    tables = [layer.table for layer in layers]
    longest = max(table.longest for table in tables)
    n_new = max(layer.new_keys.shape[2] for layer in layers)
    logits = torch.full((*queries.shape[:2], longest + n_new), -torch.inf, device=device)
    means = coefficients = None
    with_bases = [layer.basis for layer in layers if layer.basis is not None]
    if with_bases:
        most = max(with_bases, key=lambda basis: basis.n_positions)
        means = most.mean_logits(queries, heads)
        coefficients = most.query_coefficients(queries, heads)
    turn = rotation(queries.shape[-1], device)
    turned = queries @ turn
    asked: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for place, layer, table in zip(places, layers, tables, strict=True):
        for tier, at, offset in zip(layer.tiers, table.starts, table.offsets, strict=True):
            kind = (tier.keys.kind, tier.precision.key_bits)
            if kind not in asked:
                asked[kind] = _in_basis_of(tier, queries, turned, coefficients)
            own, constants = asked[kind]
            own_means = None if means is None else means[place]
            products.key_logits(tier.keys, at, own[place], constants[place], own_means, offset, logits[place])
        new = layer.new_keys[0].float()
        torch.bmm(queries[place], new.mT, out=logits[place, :, longest : longest + new.shape[1]])
    if cap is not None:
        logits = torch.where(logits == -torch.inf, logits, apply_softcap(logits, cap))
    weights = logits.softmax(dim=-1)
    whole, rotated = queries.new_zeros(queries.shape), queries.new_zeros(queries.shape)
    zeros = queries.new_zeros(queries.shape[:2])
    for place, layer, table in zip(places, layers, tables, strict=True):
        for tier, at, offset in zip(layer.tiers, table.starts, table.offsets, strict=True):
            products.value_sums(tier.values, at, weights[place], offset, whole[place], rotated[place], zeros[place])
        new = layer.new_values[0].float()
        whole[place].baddbmm_(weights[place, :, longest : longest + new.shape[1]], new)
    output: Tensor = whole + (rotated + zeros[..., None]) @ turn.T
    return output.to(query.dtype).view(len(layers), 1, -1, queries.shape[-1])


def of_similar_length(layers: Mapping[int, PackedPairs], num_heads: int) -> list[list[int]]:
    """
    Groups of layers, by their keys, for :func:`packed_attention_together`.

    It computes as many logits for each layer as the longest one of the group has. So a group has at most
    ``LOGITS_AT_ONCE``, unless it has only one layer.
    """
    groups: list[list[int]] = []
    for name in sorted(layers, key=lambda name: -layers[name].table.longest):
        longest = layers[groups[-1][0]].table.longest if groups else 0
        if groups and (len(groups[-1]) + 1) * num_heads * longest <= LOGITS_AT_ONCE:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def can_attend_together(layers: Sequence[PackedPairs]) -> bool:
    """Whether :func:`packed_attention_together` serves these layers."""
    transforms = {(layer.basis.transform.hash, layer.basis.rotary) for layer in layers if layer.basis is not None}
    return len(transforms) <= 1 and all(len(layer.lengths) == 1 for layer in layers)


@dataclass(frozen=True)
class _Block:
    """Numbers (D, n) of a block. Those of codes still need scale and zero, or gain, middles and positions."""

    numbers: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def of(cls, vectors: Vectors, start: int, stop: int) -> _Block:
        if isinstance(vectors, WholeVectors):
            return cls(vectors.decode(start, stop).T)
        numbers = vectors.numbers(start, stop)
        if isinstance(vectors, TransformCodes):
            return cls(numbers, vectors.gains(start, stop), positions=vectors.positions(start, stop))
        scales = vectors.scales(start, stop)
        return cls(numbers, scales, scales * -vectors.middle)


def _in_basis_of(tier: Tier, queries: Tensor, turned: Tensor, coefficients: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    Queries (R, Q, C) in the basis of a tier's keys, and the constants (R, Q) that belong to them.

    They are given as they are, turned as vector codes are, and as coefficients of transform codes.
    """
    if isinstance(tier.keys, TransformCodes):
        assert coefficients is not None
        scaled, constants = KeyBasis.for_codes(coefficients, tier.keys.bits)
        return scaled, constants[..., 0]
    if tier.keys.kind == "whole":
        return queries, queries[..., 0]  # not used
    return turned, turned.sum(-1)


def _lengths(starts: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]


def _blocks(starts: Sequence[int]) -> Iterator[tuple[int, int, list[Part]]]:
    """Blocks of at most ``BLOCK`` neighbouring pairs of some heads: where a block starts and ends, and its parts."""
    for start in range(starts[0], starts[-1], BLOCK):
        stop = min(start + BLOCK, starts[-1])
        parts = []
        for head, (own, end) in enumerate(pairwise(starts)):
            begin, end = max(start, own), min(stop, end)
            if begin < end:
                parts.append((head, slice(begin - start, end - start), slice(begin - own, end - own)))
        yield start, stop, parts
