"""Bit layout: where the bits of each channel lie in a packed vector, as a table that a kernel can read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvpress_moe.codes.bit_packing import PLANES, Groups, planes
from kvpress_moe.codes.exact import lasting


@cache
def bit_layout(groups: Groups, device: torch.device) -> Tensor:
    """
    The places of all bits, see :func:`kvpress_moe.codes.bit_packing.Plane`.

    Parameters
    ----------
    groups : tuple of (channels, bits)
        Groups of neighbouring channels.
    device : torch.device

    Returns
    -------
    Tensor, shape (planes, 4, channels), int32
        For each plane and channel: byte, shift, mask and weight. The number of a channel is the sum over the planes of
        ``((packed[byte] >> shift) & mask) * weight``. A channel with fewer planes than others has mask 0 there.
    """
    n_planes = max(len(PLANES[bits]) for _, bits in groups)
    with lasting():
        layout = torch.zeros(n_planes, 4, sum(channels for channels, _ in groups), dtype=torch.int32)
        for plane in planes(groups):
            size = plane.bytes.stop - plane.bytes.start
            for number, (channel, below) in enumerate(zip(plane.channels, plane.below, strict=True)):
                part, byte = divmod(number, size)
                place = (plane.bytes.start + byte, part * plane.width, 2**plane.width - 1, 2**below)
                layout[1 if below else 0, :, channel] = torch.tensor(place)
        return layout.to(device)
