"""Whole vectors: keys or values as the model wrote them, with the interface of coded vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeVectors:
    """
    N vectors that are not coded.

    Attributes
    ----------
    vectors : Tensor, shape (N, D)
    """

    vectors: Tensor
    kind = "whole"
    pairs_along = 0  # dimension of the vectors

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> WholeVectors:
        """Whole vectors with other content."""
        return WholeVectors(**tensors)

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Vectors ``start`` to ``stop``, shape (n, D), float32."""
        return self.vectors[start:stop].to(torch.float32)
