"""Bit packing: numbers of 1 to 8 bits, side by side in bytes, along the head dimension."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from kvpress_moe.errors import UnsupportedModelError

#: Number of bits -> widths of its planes. A plane holds some bits of each number; its width divides 8.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


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
            f"head_dim: got {head_dim}, expected a multiple of 8, as codes fill whole bytes. Leave `precision` at None."
        )
    return head_dim * bits // 8


def pack(numbers: Tensor, bits: int) -> Tensor:
    """
    Pack whole numbers from 0 to ``2**bits - 1``.

    The channels of a plane of width 2, 4 or 8 are cut into 8 / width parts of neighbours. A byte holds one channel of
    each part, the first part in its lowest bits. So unpacking a part gives neighbours, and nothing has to be
    interleaved. In a plane of width 1, a byte holds 8 neighbours, the first in its lowest bit. They are looked up
    together, because eight shifts would take longer.

    Parameters
    ----------
    numbers : Tensor, shape (..., D), uint8
    bits : {1, 2, 3, 4, 5, 6, 8}

    Returns
    -------
    Tensor, shape (..., D * bits / 8), uint8
        The planes one after the other, the one with the lowest bits first.
    """
    packed_size(numbers.shape[-1], bits)
    planes, below = [], 0
    for width in PLANES[bits]:
        plane = (numbers >> below) & (2**width - 1)
        parts = plane.unflatten(-1, (-1, 8)).unbind(-1) if width == 1 else plane.chunk(8 // width, dim=-1)
        packed = parts[0].clone()
        for index, part in enumerate(parts[1:], start=1):
            packed |= part << (index * width)
        planes.append(packed)
        below += width
    return torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """
    The numbers that :func:`pack` was given.

    Parameters
    ----------
    packed : Tensor, shape (N, D * bits / 8), uint8
    bits : {1, 2, 3, 4, 5, 6, 8}

    Returns
    -------
    Tensor, shape (N, D), float32
    """
    head_dim = packed.shape[-1] * 8 // bits
    widths = PLANES[bits]
    planes = packed.split([head_dim * width // 8 for width in widths], dim=-1)
    if bits == 1:
        return _looked_up(packed).float()
    if len(planes) == 1:
        numbers = torch.empty(len(packed), head_dim, dtype=torch.float32, device=packed.device)
        for place, part in zip(numbers.chunk(8 // bits, dim=-1), _parts(planes[0], bits), strict=True):
            place.copy_(part)
        return numbers
    whole, below = torch.cat(list(_parts(planes[0], widths[0])), dim=-1), widths[0]
    for width, plane in zip(widths[1:], planes[1:], strict=True):
        more = _looked_up(plane) if width == 1 else torch.cat(list(_parts(plane, width)), dim=-1)
        whole |= more << below
        below += width
    return whole.float()


def _looked_up(plane: Tensor) -> Tensor:
    """The bits of a plane of width 1, shape (N, D), uint8."""
    found = _bits_of_bytes(plane.device).index_select(0, plane.flatten().int())
    return found.view(len(plane), 8 * plane.shape[-1])


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """The 8 bits of each byte, the lowest first: (256, 8), uint8."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).to(device)


def _parts(plane: Tensor, width: int) -> Iterator[Tensor]:
    """The parts of a plane, in order. Shifts by a number are vectorised, shifts by a tensor are not."""
    plane = plane.contiguous()
    for shift in range(0, 8, width):
        shifted = plane >> shift if shift else plane
        yield shifted if shift + width == 8 else shifted & (2**width - 1)
