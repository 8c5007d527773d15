"""Bit packing: numbers of 1 to 8 bits, side by side in bytes, along the head dimension."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvpress_moe.codes.exact import lasting
from kvpress_moe.errors import UnsupportedModelError

#: Number of bits -> widths of its planes, that with the lowest bits first. A plane holds some bits of each number.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}

#: (channels, bits) of neighbouring channels that have the same number of bits.
Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Plane:
    """
    Some bits of all channels that have a plane of this width.

    The channels are cut into 8 / width parts of neighbours. A byte holds one channel of each part, the first part in
    its lowest bits. So unpacking gives whole parts, and nothing has to be interleaved.

    Attributes
    ----------
    width : {1, 2, 4, 8}
        Number of bits.
    bytes : slice
        Its bytes in a packed vector.
    ranges : tuple of slice
        Its channels.
    below : tuple of int
        For each of its channels: how many bits of the number lie in other planes, below these.
    """

    width: int
    bytes: slice
    ranges: tuple[slice, ...]
    below: tuple[int, ...]

    @property
    def channels(self) -> list[int]:
        return [channel for part in self.ranges for channel in range(part.start, part.stop)]


def packed_size(head_dim: int, bits: int) -> int:
    """
    Number of bytes of ``head_dim`` numbers.

    Raises
    ------
    UnsupportedModelError
        If ``head_dim`` is not a multiple of 8.
    """
    if head_dim % 8:
        raise UnsupportedModelError(
            f"head_dim: got {head_dim}, expected a multiple of 8, as codes fill whole bytes. Leave `precision` at "
            "None; in training, use coded_share=0."
        )
    return head_dim * bits // 8


@cache
def planes(groups: Groups) -> tuple[Plane, ...]:
    """The planes of a packed vector, in the order of its bytes: the widest first, those of all groups joined."""
    found, first_byte = [], 0
    for width in (8, 4, 2, 1):
        ranges: list[slice] = []
        below: list[int] = []
        first = 0
        for channels, bits in groups:
            if width in PLANES[bits]:
                below += [sum(PLANES[bits][: PLANES[bits].index(width)])] * channels
                ranges.append(slice(first, first + channels))
            first += channels
        if ranges:
            size = len(below) * width // 8
            found.append(Plane(width, slice(first_byte, first_byte + size), tuple(ranges), tuple(below)))
            first_byte += size
    return tuple(found)


def pack(numbers: Tensor, groups: Groups) -> Tensor:
    """
    Pack whole numbers. Those of ``bits`` bits are from 0 to ``2**bits - 1``.

    Channels come first in memory, so that every step of unpacking works on long rows.

    Parameters
    ----------
    numbers : Tensor, shape (D, N), uint8
    groups : tuple of (channels, bits)
        Numbers of bits: 1, 2, 3, 4, 5, 6 or 8.

    Returns
    -------
    Tensor, shape (bytes, N), uint8
        See :class:`Plane`.
    """
    packed = numbers.new_zeros(sum(packed_size(*group) for group in groups), numbers.shape[1])
    for plane in planes(groups):
        of_plane = torch.cat([numbers[part] for part in plane.ranges])
        if any(plane.below):
            of_plane = of_plane >> torch.tensor(plane.below, dtype=torch.uint8, device=packed.device)[:, None]
        of_plane &= 2**plane.width - 1
        for place, part in zip(range(0, 8, plane.width), of_plane.chunk(8 // plane.width), strict=True):
            packed[plane.bytes] |= part << place
    return packed


def unpack(packed: Tensor, groups: Groups) -> Tensor:
    """
    The numbers that :func:`pack` was given.

    Parameters
    ----------
    packed : Tensor, shape (bytes, N), uint8
    groups : tuple of (channels, bits)

    Returns
    -------
    Tensor, shape (D, N), float32
    """
    if groups[0][1] == 8 and len(groups) == 1:
        return packed.float()
    spread = [_spread(packed[plane.bytes], plane) for plane in planes(groups)]
    if len(spread) == 1:
        return spread[0].float()
    numbers = packed.new_zeros(sum(channels for channels, _ in groups), packed.shape[1])
    for plane, rows in zip(planes(groups), spread, strict=True):
        for part, own in zip(plane.ranges, rows.split([p.stop - p.start for p in plane.ranges]), strict=True):
            numbers[part] |= own
    return numbers.float()


def _spread(packed: Tensor, plane: Plane) -> Tensor:
    """The bits of a plane's channels (channels, N), uint8, at their place in the number."""
    if plane.width == 8:
        return packed
    places, mask, weights = _constants(plane, packed.device)
    rows: Tensor = (packed >> places).bitwise_and_(mask).flatten(0, 1)
    return rows if weights is None else rows.mul_(weights)


@cache
def _constants(plane: Plane, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers as tensors, because PyTorch converts Python's anew for every operation."""
    with lasting():
        places = torch.arange(0, 8, plane.width, dtype=torch.uint8)[:, None, None].to(device)
        mask = torch.tensor(2**plane.width - 1, dtype=torch.uint8, device=device)
        weights = torch.tensor([2**below for below in plane.below], dtype=torch.uint8)[:, None].to(device)
        return places, mask, weights if any(plane.below) else None
