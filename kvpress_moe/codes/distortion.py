"""Distortion: how much of a pair each precision loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.precision import WHOLE, Precision
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.scale_bytes import LOWEST
from kvpress_moe.codes.transform_codes import BLOCK, TRANSFORM_BITS, weighted_errors
from kvpress_moe.codes.vector_codes import relative_error

_HARMLESS = 1e-4  # of the mean squared norm of a head's values

# B = batch, H = KV heads, S = tokens of the prompt, D = head dim, M = precisions of a menu


@dataclass(frozen=True)
class Distortion:
    """
    Expected loss of each pair, keys and values apart.

    Attributes
    ----------
    keys : mapping of int -> Tensor, each (B, H, S), float32
        By the number of bits: mean squared error of the pair's attention logit.
    values : mapping of int -> Tensor, each (B, H, S), float32
        By the number of bits: squared error of the value, over its squared norm.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    def to(self, device: torch.device) -> Distortion:
        """The same losses on a device."""
        keys, values = ({bits: loss.to(device) for bits, loss in of.items()} for of in (self.keys, self.values))
        return Distortion(keys, values)

    def total(self, menu: Sequence[Precision], like: Tensor) -> Tensor:
        """
        Loss of each pair with each precision, of its key plus of its value: (M, B, H, S), float32.

        1 is the loss of a pair that is evicted. What stays as the model wrote it loses nothing. ``like`` has the
        shape (B, H, S).
        """
        nothing = torch.zeros_like(like, dtype=torch.float32)
        return torch.stack(
            [self.keys.get(one.key_bits, nothing) + self.values.get(one.value_bits, nothing) for one in menu]
        )


def distortions(
    keys: Tensor,
    values: Tensor,
    menu: Sequence[Precision],
    scaling: float,
    query_power: Tensor,
    basis: KeyBasis | None = None,
    positions: Tensor | None = None,
) -> Distortion:
    """
    Expected loss of each pair with each number of bits that a menu has.

    The error of rotated vectors follows from their largest channel, because rounding errors are nearly uniform within a
    step. The error of transform codes is measured.

    Parameters
    ----------
    keys, values : Tensor, shape (B, H, S, D)
    menu : sequence of M Precision
    scaling : float
        What the layer multiplies products of queries and keys with.
    query_power : Tensor, shape (H,)
        Mean squared norm of the queries of each KV head.
    basis : KeyBasis, optional
        With a basis, keys of few bits are transform codes.
    positions : Tensor, shape (B or 1, S), int64, optional
        Positions of the keys. Needed with a basis.
    """
    key_bits = {precision.key_bits for precision in menu} - {WHOLE}
    value_bits = {precision.value_bits for precision in menu} - {WHOLE}
    of_transform = key_bits & set(TRANSFORM_BITS) if basis is not None else set()
    of_keys: dict[int, Tensor] = {}
    of_values: dict[int, Tensor] = {}
    if value_bits:
        norms = values.float().square().sum(-1)
        usual = norms.mean(-1, keepdim=True)  # an error below it does no harm, also if the value itself is nearly zero
        loss = _squared_reach(values) * values.shape[-1] / torch.maximum(norms, _HARMLESS * usual).clamp(min=1e-12)
        of_values = {bits: loss * relative_error(bits) for bits in sorted(value_bits)}
    if key_bits - of_transform:
        loss = _squared_reach(keys) * (scaling**2 * query_power[:, None].to(keys.device))
        of_keys = {bits: loss * relative_error(bits) for bits in sorted(key_bits - of_transform)}
    if of_transform and basis is not None and positions is not None:
        of_keys |= _of_transform(basis, basis.coefficients(keys, positions), sorted(of_transform), scaling)
    return Distortion(of_keys, of_values)


def _squared_reach(vectors: Tensor) -> Tensor:
    """
    Squared magnitude of the largest channel of rotated vectors: (B, H, S), float32.

    It is at least that of the smallest vector that codes can tell from 0.
    """
    turn = rotation(vectors.shape[-1], vectors.device)
    largest = (vectors.float() @ turn).abs_().amax(-1)  # ten times as fast as aminmax
    return largest.clamp_(min=2.0**LOWEST).square_()


def _of_transform(basis: KeyBasis, coefficients: Tensor, bits: Sequence[int], scaling: float) -> dict[int, Tensor]:
    """Bits -> loss (B, H, S) of keys as transform codes, measured."""
    weight = (basis.transform.deviation.float() * scaling).square()  # (H, D)
    losses = {number: torch.empty(coefficients.shape[:3], device=coefficients.device) for number in bits}
    for row in range(coefficients.shape[0]):
        for head in range(coefficients.shape[1]):
            for start in range(0, coefficients.shape[2], BLOCK):
                block = coefficients[row, head, start : start + BLOCK]
                for number, error in weighted_errors(block, bits, weight[head]).items():
                    losses[number][row, head, start : start + BLOCK] = error
    return losses
