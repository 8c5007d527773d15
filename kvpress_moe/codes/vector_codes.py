"""Vector codes: each vector of a head is rounded to a few bits a channel, with a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_moe.codes.bit_packing import Groups, pack, packed_size, unpack
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.scale_bytes import from_bytes, to_bytes

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BYTES = 1  # of a vector
BLOCK = 4096  # vectors that are encoded at once; their numbers stay in the processor's cache
#: Parts of the whole range that few levels may cover. Their error is smaller, unless a channel lies far out.
_PARTS = {2: (1.0, 0.75, 0.58), 3: (1.0, 0.8), 4: (1.0, 0.92)}
#: Expected squared error of a channel over the squared reach, for normal distributions of 64 to 128 channels.
_ERRORS = {2: 0.0167, 3: 0.0050, 4: 0.00134}


@dataclass(frozen=True, eq=False)
class VectorCodes:
    """
    N coded vectors of a rotated space: channel c of a rotated vector is ``reach * (number[c] / middle - 1)``.

    The middle of the numbers stands for 0. After the rotation, channels lie evenly on both sides of it.

    Attributes
    ----------
    packed : Tensor, shape (D * bits / 8, N), uint8
    reach : Tensor, shape (N,), uint8
        The largest level of each vector, see :mod:`kvpress_moe.codes.scale_bytes`.
    bits : int
    """

    packed: Tensor
    reach: Tensor
    bits: int
    kind = "rotated"
    pairs_along = -1  # dimension of the vectors in all tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "reach": self.reach}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> VectorCodes:
        """Codes of the same kind with other vectors."""
        return VectorCodes(**tensors, bits=self.bits)

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rotated vectors ``start`` to ``stop``, shape (n, D), float32, with the rounding error of the code."""
        numbers = self.numbers(start, stop)
        return numbers.sub_(self.middle).mul_(self.scales(start, stop)).T

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers ``start`` to ``stop``, shape (D, n), float32, without scales."""
        return unpack(self.packed[:, start:stop], self.groups)

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Distance of neighbouring levels of vectors ``start`` to ``stop``, shape (n,), float32."""
        return from_bytes(self.reach[start:stop]) / self.middle

    @property
    def middle(self) -> float:
        """The number that stands for 0. It lies between two numbers."""
        return middle_of(self.bits)

    @property
    def groups(self) -> Groups:
        """Groups of channels, with the number of bits of each: all have the same."""
        return ((len(self.packed) * 8 // self.bits, self.bits),)


def middle_of(bits: int) -> float:
    """The number that stands for 0 in codes of ``bits`` bits."""
    middle: float = ((1 << bits) - 1) / 2
    return middle


def relative_error(bits: int) -> float:
    """Expected squared error of a channel over the squared reach of its vector, the largest magnitude of a channel."""
    full_range: float = 1.05 / (3 * (2**bits - 1) ** 2)
    return _ERRORS.get(bits, full_range)


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one coded vector, with its scale."""
    return packed_size(head_dim, bits) + SCALE_BYTES


def encode(vectors: Tensor, bits: int) -> VectorCodes:
    """
    Rotate vectors, then round them to ``2**bits`` evenly spaced levels, as many above 0 as below.

    This is quantisation per token, as KIVI (arXiv 2402.02750) uses it for values, after the rotation of QuaRot
    (arXiv 2404.00456), so that no channel lies far out, and none needs a zero of its own. With few bits, the levels may
    cover less than the whole range of a vector, if this makes its error smaller.

    Parameters
    ----------
    vectors : Tensor, shape (N, D)
    bits : {2, 3, 4, 5, 6, 8}

    Raises
    ------
    NotFiniteError
        If a vector contains NaN or infinity.
    UnsupportedInputError
        If a channel of a rotated vector is larger than 2435.
    """
    turn = rotation(vectors.shape[-1], vectors.device)
    packed, reaches = [], []
    for block in vectors.split(BLOCK):
        rotated = block.float() @ turn
        reach = to_bytes(best_reach(rotated, bits))
        numbers = round_to_levels(rotated, from_bytes(reach), bits)
        packed.append(pack(numbers.to(torch.uint8).T.contiguous(), ((vectors.shape[-1], bits),)))
        reaches.append(reach)
    if len(packed) == 1:  # nothing to join
        return VectorCodes(packed[0], reaches[0], bits)
    return VectorCodes(torch.cat(packed, dim=-1), torch.cat(reaches), bits)


def round_to_levels(vectors: Tensor, reach: Tensor, bits: int) -> Tensor:
    """Whole numbers from 0 to ``2**bits - 1``, shape (N, D), float32, for vectors (N, D) with a reach (N,) each."""
    numbers = vectors * (middle_of(bits) / reach)[:, None]
    numbers.add_(middle_of(bits)).round_().clamp_(0, (1 << bits) - 1)
    return numbers


def best_reach(vectors: Tensor, bits: int) -> Tensor:
    """Of a few values for each vector (N, D), the one with the smallest squared error: (N,), float32."""
    largest = vectors.abs().amax(-1)
    parts = _PARTS.get(bits, (1.0,))
    if len(parts) == 1:
        return largest
    tried = torch.stack([largest.clamp(min=1e-30) * part for part in parts])
    errors = [
        (round_to_levels(vectors, reach, bits) / middle_of(bits) - 1)
        .mul_(reach[:, None])
        .sub_(vectors)
        .square_()
        .sum(-1)
        for reach in tried
    ]
    return tried.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
