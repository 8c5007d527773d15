"""Vector codes: each vector of a head is rounded to a few bits a channel, with a scale and a zero of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_moe.codes.bit_packing import Groups, pack, packed_size, unpack
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.errors import NotFiniteError, UnsupportedInputError

BITS = (2, 3, 4, 5, 6, 8)
SCALE_BYTES = 4  # of a vector: scale and zero in float16
BLOCK = 4096  # vectors that are encoded at once; their numbers stay in the processor's cache
_SMALLEST = 2.0**-24  # the smallest positive float16
#: With 2 bits, four levels within less than the whole range have a smaller error, unless a channel lies far out.
_NARROWER = 0.7
_ERROR_OF_2_BITS = 0.0053  # of normal distributions of 64 to 128 channels


@dataclass(frozen=True)
class VectorCodes:
    """
    N coded vectors of a rotated space: channel c of a rotated vector is ``zero + scale * number[c]``.

    Attributes
    ----------
    packed : Tensor, shape (D * bits / 8, N), uint8
    scale, zero : Tensor, shape (N,), float16
    bits : int
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    kind = "rotated"
    pairs_along = -1  # dimension of the vectors in all tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scale": self.scale, "zero": self.zero}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> VectorCodes:
        """Codes of the same kind with other vectors."""
        return VectorCodes(**tensors, bits=self.bits)

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rotated vectors ``start`` to ``stop``, shape (n, D), float32, with the rounding error of the code."""
        part = slice(start, stop)
        numbers = self.numbers(start, stop)
        return numbers.mul_(self.scale[part].float()).add_(self.zero[part].float()).T

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers ``start`` to ``stop``, shape (D, n), float32, without scales and zeros."""
        return unpack(self.packed[:, start:stop], self.groups)

    @property
    def groups(self) -> Groups:
        """Groups of channels, with the number of bits of each: all have the same."""
        return ((len(self.packed) * 8 // self.bits, self.bits),)


def relative_error(bits: int) -> float:
    """Expected squared error of a channel over the squared range of its vector."""
    return _ERROR_OF_2_BITS if bits == 2 else 1 / (12 * (2**bits - 1) ** 2)


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one coded vector, with its scale and zero."""
    return packed_size(head_dim, bits) + SCALE_BYTES


def encode(vectors: Tensor, bits: int) -> VectorCodes:
    """
    Rotate vectors, then round them to ``2**bits`` evenly spaced levels between their smallest and largest channel.

    This is asymmetric quantisation per token, as KIVI (arXiv 2402.02750) uses it for values, after the rotation of
    QuaRot (arXiv 2404.00456), so that no channel lies far out.

    Parameters
    ----------
    vectors : Tensor, shape (N, D)
    bits : {2, 3, 4, 5, 6, 8}

    Raises
    ------
    NotFiniteError
        If a vector contains NaN or infinity.
    UnsupportedInputError
        If a scale or zero is too large for float16.
    """
    turn = rotation(vectors.shape[-1], vectors.device)
    blocks = []
    for block in vectors.split(BLOCK):
        numbers, scale, zero = round_to_levels(block.float() @ turn, bits)
        blocks.append((pack(numbers.to(torch.uint8).T.contiguous(), ((vectors.shape[-1], bits),)), scale, zero))
    packed, scale, zero = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] for parts in zip(*blocks))  # noqa: B905
    return VectorCodes(packed, scale, zero, bits)


def round_to_levels(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    The numbers of :func:`encode`, not packed yet.

    Returns
    -------
    numbers : Tensor, shape (N, D), float32
        Whole numbers from 0 to ``2**bits - 1``.
    scale, zero : Tensor, shape (N,), float16
    """
    low, high = vectors.aminmax(dim=-1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise NotFiniteError("codes: got NaN or infinity, expected finite keys and values. Load the model in float32.")
    numbers, scale, zero = _round(vectors, low, high, bits)
    if bits == 2:
        middle, reach = (high + low) / 2, (high - low) / 2 * _NARROWER
        narrower = _round(vectors, middle - reach, middle + reach, bits)
        better = _error(vectors, *narrower) < _error(vectors, numbers, scale, zero)
        numbers = torch.where(better[:, None], narrower[0], numbers)
        scale, zero = torch.where(better, narrower[1], scale), torch.where(better, narrower[2], zero)
    return numbers, scale, zero


def _round(vectors: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    most = 2**bits - 1
    zero = low.half()
    scale = ((high - zero.float()) / most).clamp(min=_SMALLEST).half()
    if not bool((zero.isfinite() & scale.isfinite()).all()):
        raise UnsupportedInputError(
            "codes: got keys or values beyond the range of float16, expected smaller ones. Leave `precision` at None."
        )
    step = scale.float()[:, None]
    numbers = torch.addcdiv(-zero.float()[:, None] / step, vectors, step).round_().clamp_(0, most)
    return numbers, scale, zero


def _error(vectors: Tensor, numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    decoded = torch.addcmul(zero.float()[:, None], numbers, scale.float()[:, None])
    return (vectors - decoded).square_().sum(-1)
