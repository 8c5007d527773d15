"""A fixed rotation of the head dimension. It spreads outlying channels over all channels before they are rounded."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvpress_moe.codes.exact import lasting


@cache
def rotation(head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """
    An orthogonal matrix (D, D), float32: a Hadamard matrix where there is one of Sylvester's kind.

    For a power of two, all entries are ``±1 / sqrt(D)`` (QuaRot, arXiv 2404.00456). For other sizes, for example 96 =
    32 · 3 or 80 = 16 · 5, it is the Kronecker product of a Hadamard matrix and an orthonormal cosine matrix of the odd
    factor. Half of the channels, in a fixed order without a pattern, change their sign before. Otherwise vectors whose
    channels are alike would become one large channel. Vectors are rows: ``rotated = vectors @ rotation``. The
    transpose rotates back.
    """
    with lasting():
        return _rotation(head_dim).to(device)


def _rotation(head_dim: int) -> Tensor:
    odd = head_dim
    while odd % 2 == 0:
        odd //= 2
    matrix: Tensor = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] * odd < head_dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix = torch.kron(matrix / matrix.shape[0] ** 0.5, _cosines(odd))
    mixed = (torch.arange(1, head_dim + 1) * 2654435769) % 2**32  # the finaliser of xxHash: bits without a pattern
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    mixed ^= mixed >> 13
    turning: Tensor = (matrix * (1 - 2 * (mixed & 1))[:, None]).float()
    return turning


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform, as a matrix (size, size)."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (index[:, None] + 0.5) * index) * (2 / size) ** 0.5
    matrix[:, 0] = size**-0.5
    cosines: Tensor = matrix
    return cosines
