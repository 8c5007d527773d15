"""Transform codes: coefficients of keys, rounded with more bits for those that matter more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvpress_moe.codes.bit_packing import Groups, pack, packed_size, unpack
from kvpress_moe.codes.exact import lasting
from kvpress_moe.codes.scale_bytes import from_bytes, to_bytes

TRANSFORM_BITS = (2, 3, 4, 6)
BLOCK = 4096  # vectors that are encoded at once
GAIN_BYTES = 1  # of a key
#: Bits -> step between the levels with the smallest squared error for a normal distribution (Max, 1960).
_STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}


@dataclass(frozen=True, eq=False)
class TransformCodes:
    """
    N coded keys. Coefficient c is ``gain * step[c] * (number[c] - middle[c])``, or 0 where it has no bits.

    Attributes
    ----------
    packed : Tensor, shape (D * bits / 8, N), uint8
    gain : Tensor, shape (N,), uint8
        See :mod:`kvpress_moe.codes.scale_bytes`.
    position : Tensor, shape (N,), int16 or int32
        Position of the key. int16 stands for 0 to 65,535.
    bits : {2, 3, 4, 6}
        Mean number of bits of a coefficient.
    """

    packed: Tensor
    gain: Tensor
    position: Tensor
    bits: int
    kind = "transformed"
    pairs_along = -1  # dimension of the keys in all tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "gain": self.gain, "position": self.position}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TransformCodes:
        """Codes of the same kind with other keys."""
        return TransformCodes(**tensors, bits=self.bits)

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Coefficients ``start`` to ``stop`` over their steps, shape (n, those that have bits), float32."""
        numbers = self.numbers(start, stop)
        return numbers.sub_(middles(self.head_dim, self.bits, numbers.device)[:, None]).mul_(self.gains(start, stop)).T

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers ``start`` to ``stop``, shape (coefficients that have bits, n), float32."""
        return unpack(self.packed[:, start:stop], self.groups)

    def gains(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Gains ``start`` to ``stop``, shape (n,), float32."""
        return from_bytes(self.gain[start:stop])

    @property
    def head_dim(self) -> int:
        return len(self.packed) * 8 // self.bits

    @property
    def groups(self) -> Groups:
        """Groups of neighbouring coefficients, with the number of bits of each."""
        return profile(self.head_dim, self.bits)

    def positions(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Positions ``start`` to ``stop``, int64."""
        stored = self.position[start:stop].long()
        return stored & 0xFFFF if self.position.dtype == torch.int16 else stored


def profile(head_dim: int, bits: int) -> Groups:
    """
    How many of the sorted coefficients get how many bits: ``bits`` on average.

    About a quarter gets two bits more, and the last quarter two bits less. Counts are multiples of 8. Coefficients
    without bits are left out.
    """
    outer = 8 * round(head_dim / 32)
    groups = [(outer, bits + 2), (head_dim - 2 * outer, bits), (outer, bits - 2)]
    return tuple((count, number) for count, number in groups if count and number)


@cache
def steps(head_dim: int, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Step of each coefficient that has bits, float32."""
    with lasting():
        of_groups = [
            torch.full((count,), _STEPS[number], dtype=torch.float32) for count, number in profile(head_dim, bits)
        ]
        return torch.cat(of_groups).to(device)


@cache
def middles(head_dim: int, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The number that stands for 0, for each coefficient that has bits, float32."""
    with lasting():
        of_groups = [
            torch.full((count,), 2 ** (number - 1) - 0.5, dtype=torch.float32)
            for count, number in profile(head_dim, bits)
        ]
        return torch.cat(of_groups).to(device)


def position_bytes(n_positions: int) -> int:
    """Bytes of a position."""
    return 2 if n_positions <= 2**16 else 4


def key_bytes(head_dim: int, bits: int, n_positions: int) -> int:
    """Bytes of one coded key, with its gain and position."""
    return packed_size(head_dim, bits) + GAIN_BYTES + position_bytes(n_positions)


def encode_coefficients(coefficients: Tensor, positions: Tensor, bits: int, n_positions: int) -> TransformCodes:
    """
    Round coefficients.

    The gain of a key is as large as it has to be, so that no coefficient is cut off.

    Parameters
    ----------
    coefficients : Tensor, shape (N, D), float32
        See :meth:`kvpress_moe.codes.key_transform.KeyBasis.coefficients`.
    positions : Tensor, shape (N,), int64
    bits : {2, 3, 4, 6}
    n_positions : int
        Positions are below this number.

    Raises
    ------
    NotFiniteError
        If a coefficient is NaN or infinity.
    UnsupportedInputError
        If a gain would be larger than 2435.
    """
    groups = profile(coefficients.shape[-1], bits)
    of_step = steps(coefficients.shape[-1], bits, coefficients.device)
    packed, gains = [], []
    for block in coefficients.split(BLOCK):
        gain = to_bytes(_gains(_largest(block), block.shape[-1], bits))
        scaled = (block[:, : len(of_step)] / of_step).div_(from_bytes(gain)[:, None])
        parts = scaled.split([count for count, _ in groups], dim=-1)
        levels = [
            part.floor().add_(2 ** (number - 1)).clamp_(0, 2**number - 1).to(torch.uint8)
            for part, (_, number) in zip(parts, groups, strict=True)
        ]
        packed.append(pack(torch.cat(levels, dim=-1).T.contiguous(), groups))
        gains.append(gain)
    stored = positions.to(torch.int32 if position_bytes(n_positions) == 4 else torch.int16)  # wraps round
    return TransformCodes(torch.cat(packed, dim=-1), torch.cat(gains), stored, bits)


def weighted_errors(coefficients: Tensor, bits: Sequence[int], weight: Tensor) -> dict[int, Tensor]:
    """
    Bits -> sum of the squared errors of coefficients (N, D) after coding, weighted by ``weight`` (D,): shape (N,).

    Levels are in the middle of their steps, so no coefficient is further from one than half of a step.
    """
    largest = _largest(coefficients)
    found = {}
    for number in bits:
        of_step = steps(coefficients.shape[-1], number, coefficients.device)
        with_bits = len(of_step)
        gain = from_bytes(to_bytes(_gains(largest, coefficients.shape[-1], number)))
        rest = (coefficients[:, :with_bits] / of_step).mul_(gain.reciprocal()[:, None])
        rest.sub_(rest.floor()).sub_(0.5).square_()
        error = (rest @ (of_step.square() * weight[:with_bits])).mul_(gain.square())
        if with_bits < len(weight):  # the last coefficients have no bits
            error += coefficients[:, with_bits:].square() @ weight[with_bits:]
        found[number] = error
    return found


def _largest(coefficients: Tensor) -> Tensor:
    """Largest magnitude in each group of coefficients (N, D); the groups are those of all numbers of bits: (3, N)."""
    head_dim = coefficients.shape[-1]
    counts = [count for count, _ in profile(head_dim, TRANSFORM_BITS[-1])]
    return torch.stack([part.abs().amax(-1) for part in coefficients.split(counts, dim=-1)])


def _gains(largest: Tensor, head_dim: int, bits: int) -> Tensor:
    """The smallest gain (N,) with which no coefficient is cut off, by the largest ones of each group (3, N)."""
    groups = profile(head_dim, bits)
    reach = [one / (_STEPS[number] * 2 ** (number - 1)) for one, (_, number) in zip(largest, groups, strict=False)]
    return torch.stack(reach).amax(0)
