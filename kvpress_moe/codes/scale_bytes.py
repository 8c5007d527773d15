"""Scale bytes: a positive number in one byte, on a fixed logarithmic scale."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_moe.errors import NotFiniteError, UnsupportedInputError

STEPS = 12  # per factor of two: neighbouring numbers differ by 5.9 %
LOWEST = -10.0  # log2 of what the byte 0 stands for; 255 stands for 2 ** 11.25


def to_bytes(numbers: Tensor) -> Tensor:
    """
    Round numbers up to the next one that a byte stands for: uint8, the same shape.

    Raises
    ------
    NotFiniteError
        If a number is NaN or infinity.
    UnsupportedInputError
        If a number is larger than 2435.
    """
    # What a byte stands for already may have grown by rounding, hence the thousandth of a step.
    steps = ((numbers.float().clamp(min=2.0**LOWEST).log2() - LOWEST) * STEPS - 1e-3).ceil()
    if steps.numel() and not bool(steps.amax() <= 255):  # also if it is NaN
        if not bool(numbers.isfinite().all()):
            raise NotFiniteError(
                "codes: got NaN or infinity, expected finite keys and values. Load the model in float32."
            )
        raise UnsupportedInputError(
            f"codes: got keys or values with numbers up to {float(numbers.max()):.3g} after their rotation or "
            "transform, expected at most 2435. Leave `precision` at None; in training, use coded_share=0."
        )
    return steps.to(torch.uint8)


def from_bytes(stored: Tensor) -> Tensor:
    """The numbers that bytes stand for, float32."""
    return torch.exp2(stored.float() / STEPS + LOWEST)
