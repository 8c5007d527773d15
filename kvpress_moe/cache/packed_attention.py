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


@dataclass(frozen=True)
class Segment:
    """
    Neighbouring heads of a layer.

    Attributes
    ----------
    layer : PackedPairs
    heads : slice
        Among the B·H heads of the layer.
    rows : slice
        Their rows in the tensors of all heads that are computed together.
    """

    layer: PackedPairs
    heads: slice
    rows: slice


class Bases:
    """
    Queries (R, Q, D), float32, in all bases that keys are stored in.

    Attributes
    ----------
    queries : Tensor, shape (R, Q, D)
        For whole keys.
    turned : Tensor, shape (R, Q, D)
        Rotated as vector codes are.
    coefficients : Tensor or None, shape (R, Q, D)
        In the basis of transform codes.
    means : Tensor or None, shape (R, Q, n_positions)
        Their products with the means of transform codes at every position.
    """

    def __init__(self, queries: Tensor, segments: Sequence[Segment]):
        self.queries = queries = queries.contiguous()
        self.turned = queries @ rotation(queries.shape[-1], queries.device)
        self.coefficients: Tensor | None = None
        self.means: Tensor | None = None
        with_codes = [segment.layer for segment in segments if segment.layer.has_transform_codes]
        bases = [layer.basis for layer in with_codes if layer.basis is not None]
        if bases:
            basis = max(bases, key=lambda basis: basis.n_positions)
            n_heads = segments[0].layer.new_keys.shape[1]
            heads = [torch.arange(one.heads.start, one.heads.stop, device=queries.device) for one in segments]
            of_rows = torch.cat(heads) % n_heads
            self.means = basis.mean_logits(queries, of_rows)
            self.coefficients = basis.query_coefficients(queries, of_rows)
        self._asked: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def of(self, tier: Tier) -> tuple[Tensor, Tensor]:
        """Queries (R, Q, C) in the basis of a tier's keys, and the constants (R, Q) that belong to them."""
        kind = (tier.keys.kind, tier.precision.key_bits)
        if kind not in self._asked:
            self._asked[kind] = self._of(tier)
        return self._asked[kind]

    def _of(self, tier: Tier) -> tuple[Tensor, Tensor]:
        if isinstance(tier.keys, TransformCodes):
            assert self.coefficients is not None
            scaled, constants = KeyBasis.for_codes(self.coefficients, tier.keys.bits)
            return scaled, constants[..., 0]
        if tier.keys.kind == "whole":
            return self.queries, self.queries[..., 0]  # not used
        return self.turned, self.turned.sum(-1)


class Products:
    """
    How pairs are multiplied: in plain PyTorch. Blocks of codes are unpacked, then multiplied head by head.

    All tensors are float32. Results go into tensors that all tiers share, so that none has to be copied.
    """

    def key_logits(self, segments: Sequence[Segment], bases: Bases, logits: Tensor) -> None:
        """
        Write the logits of all pairs.

        Parameters
        ----------
        segments : sequence of Segment
        bases : Bases
        logits : Tensor, shape (R, Q, n)
        """
        for segment in segments:
            for number in range(len(segment.layer.tiers)):
                self.tier_logits(segment, number, bases, logits[segment.rows])

    def tier_logits(self, segment: Segment, number: int, bases: Bases, logits: Tensor) -> None:
        """Write the logits of the pairs of one tier. ``logits`` are those of the segment."""
        tier = segment.layer.tiers[number]
        starts, offsets = segment.layer.table.of_heads(number, segment.heads)
        asked, constants = (tensor[segment.rows] for tensor in bases.of(tier))
        means = None if bases.means is None else bases.means[segment.rows]
        for start, stop, parts in _blocks(starts):
            block = _Block.of(tier.keys, start, stop)
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

    def value_sums(self, segments: Sequence[Segment], weights: Tensor, whole: Tensor, rotated: Tensor) -> None:
        """
        Add the weighted values of all pairs.

        Parameters
        ----------
        segments : sequence of Segment
        weights : Tensor, shape (R, Q, n + T)
            Attention weights of pairs and later tokens.
        whole, rotated : Tensor, shape (R, Q, D)
            Sums of whole values, and of coded ones, which are rotated.
        """
        for segment in segments:
            for number in range(len(segment.layer.tiers)):
                own = (tensor[segment.rows] for tensor in (weights, whole, rotated))
                self.tier_sums(segment, number, *own)

    def tier_sums(self, segment: Segment, number: int, weights: Tensor, whole: Tensor, rotated: Tensor) -> None:
        """Add the weighted values of one tier. The tensors are those of the segment."""
        values = segment.layer.tiers[number].values
        starts, offsets = segment.layer.table.of_heads(number, segment.heads)
        for start, stop, parts in _blocks(starts):
            block = _Block.of(values, start, stop)
            for head, here, there in parts:
                place = weights[head, :, offsets[head] + there.start : offsets[head] + there.stop]
                if block.scale is None or block.zero is None:
                    whole[head].addmm_(place, block.numbers[:, here].T)
                else:
                    rotated[head].addmm_(place * block.scale[here], block.numbers[:, here].T)
                    rotated[head].add_((place @ block.zero[here])[:, None])


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
    width = layer.width + new_logits.shape[2]
    n_rows = max(1, min(grouped.shape[1], LOGITS_AT_ONCE // width))
    n_heads = max(1, LOGITS_AT_ONCE // (n_rows * width))
    for first in range(0, len(grouped), n_heads):
        heads = slice(first, min(first + n_heads, len(grouped)))
        segment = Segment(layer, heads, slice(0, heads.stop - first))
        for row in range(0, grouped.shape[1], n_rows):
            rows = slice(row, row + n_rows)
            new = [(segment.rows, new_logits[heads, rows], new_values[heads])]
            output[heads, rows] = _attend(grouped[heads, rows].float(), [segment], new, cap, products)
    return output.to(query.dtype).view(n_batch, num_heads, q_len, head_dim).transpose(1, 2)


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
    n_heads = layers[0].new_keys.shape[1]
    queries = (query.unflatten(1, (n_heads, -1)).squeeze(3) * scaling).flatten(0, 1).float()  # (N·H, G, D)
    places = [slice(first, first + n_heads) for first in range(0, len(queries), n_heads)]
    segments = [Segment(layer, slice(0, n_heads), rows) for layer, rows in zip(layers, places, strict=True)]
    new = [
        (rows, apply_softcap(queries[rows] @ layer.new_keys[0].float().mT, cap), layer.new_values[0])
        for layer, rows in zip(layers, places, strict=True)
    ]
    output = _attend(queries, segments, new, cap, products)
    return output.to(query.dtype).view(len(layers), 1, -1, query.shape[-1])


def _attend(
    queries: Tensor,
    segments: Sequence[Segment],
    new: Sequence[tuple[slice, Tensor, Tensor]],
    cap: float | None,
    products: Products,
) -> Tensor:
    """
    The output (R, Q, D), float32, of scaled queries.

    ``new`` has rows, logits (of these rows, Q, T) and values (of these rows, T, D) of later tokens.
    """
    longest = max(segment.layer.table.longest for segment in segments)
    n_new = max(logits.shape[-1] for _, logits, _ in new)
    logits = queries.new_full((*queries.shape[:2], longest + n_new), -torch.inf)  # float32, as the queries are
    products.key_logits(segments, Bases(queries, segments), logits)
    if cap is not None:
        logits = torch.where(logits == -torch.inf, logits, apply_softcap(logits, cap))
    for rows, own, _ in new:
        logits[rows, :, longest : longest + own.shape[-1]] = own
    weights = logits.softmax(dim=-1)
    del logits
    whole, rotated = queries.new_zeros(queries.shape), queries.new_zeros(queries.shape)
    for rows, _, values in new:
        torch.bmm(weights[rows, :, longest : longest + values.shape[1]], values.float(), out=whole[rows])
    products.value_sums(segments, weights, whole, rotated)
    return whole + rotated @ rotation(queries.shape[-1], queries.device).T


def of_similar_length(layers: Mapping[int, PackedPairs], num_heads: int) -> list[list[int]]:
    """
    Groups of layers, by their keys, for :func:`packed_attention_together`.

    It computes as many numbers for each layer as the widest one of the group needs. So a group has at most
    ``LOGITS_AT_ONCE``, unless it has only one layer.
    """
    groups: list[list[int]] = []
    widths = {name: layer.width + layer.new_keys.shape[2] for name, layer in layers.items()}
    for name in sorted(layers, key=lambda name: -widths[name]):
        widest = widths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * num_heads * widest <= LOGITS_AT_ONCE:
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
