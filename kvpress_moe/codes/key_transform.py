"""Key transform: static bases for the keys of a layer's heads, in which few bits suffice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.codes.exact import lasting
from kvpress_moe.codes.rotary import Rotary
from kvpress_moe.codes.transform_codes import TransformCodes, middles, steps

# R = some rows and heads, H = KV heads, D = head dim


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """
    What is known beforehand of the keys of a layer: their mean, and how they vary.

    A key is its head's mean, turned by the rotary embedding to the key's position, plus a rest. The rest is written in
    a basis of its own. Its coefficients there are not correlated, have variance 1 and are sorted: the first ones matter
    most to attention. This is transform coding (a Karhunen-Loève transform, weighted by the queries). KVTC
    (arXiv 2511.01815) uses it for keys before the rotary embedding. Here the basis applies after it, so that a query is
    transformed once, instead of every key being turned again.

    Attributes
    ----------
    mean : Tensor, shape (H, D), float16
        Mean of the keys before the rotary embedding.
    synthesis : Tensor, shape (H, D, D), float16
        ``rest = coefficients @ synthesis``.
    deviation : Tensor, shape (H, D), float16
        How much an error of 1 in a coefficient changes products of queries and keys, root mean square, without scaling.
    """

    mean: Tensor
    synthesis: Tensor
    deviation: Tensor
    _moved: dict[str, KeyTransform] = field(default_factory=dict, repr=False)

    @cached_property
    def analysis(self) -> Tensor:
        """``coefficients = rest @ analysis``, shape (H, D, D), float32."""
        with lasting():
            inverse: Tensor = torch.linalg.inv(self.synthesis.clone().double()).float()
            return inverse

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the numbers. It tells whether codes were made with this transform."""
        digest = hashlib.sha256()
        for tensor in (self.mean, self.synthesis, self.deviation):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> KeyTransform:
        """The same transform on a device."""
        if self.mean.device == torch.device(device):
            return self
        key = str(device)
        if key not in self._moved:  # made once, because every prompt and every cache asks for it
            with lasting():
                mean, synthesis, deviation = (p.clone().to(device) for p in (self.mean, self.synthesis, self.deviation))
                self._moved[key] = KeyTransform(mean, synthesis, deviation)
        return self._moved[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyTransform:
        """The same object: it never changes, and copies of a cache share it."""
        return self


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """
    The key transform of a layer for one prompt.

    Attributes
    ----------
    transform : KeyTransform
    rotary : Rotary
    n_positions : int
        Positions of the prompt's keys are below this number.
    """

    transform: KeyTransform
    rotary: Rotary
    n_positions: int

    def coefficients(self, keys: Tensor, positions: Tensor) -> Tensor:
        """
        Coefficients of keys (B, H, S, D) at positions (B or 1, S): (B, H, S, D), float32.
        """
        means = self.rotary.turn(self.transform.mean[None, :, None], positions[:, None], self.n_positions)
        rest: Tensor = keys.float() - means
        return rest @ self.transform.analysis

    def restore(self, codes: TransformCodes, head: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Decoded keys of one head, shape (n, D), float32."""
        coefficients = codes.decode(start, stop)
        used = self._scaled(codes.bits)[head]
        means = self.rotary.turn(self.transform.mean[head], codes.positions(start, stop), self.n_positions)
        return coefficients @ used + means

    def query_coefficients(self, queries: Tensor, heads: Tensor) -> Tensor:
        """Queries (R, Q, D) of some heads (R,) in the basis of the coefficients: (R, Q, D), float32."""
        return queries @ self.transform.synthesis[heads].float().mT

    @staticmethod
    def for_codes(coefficients: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """
        What the coefficients (R, Q, D) of queries become, so that codes need not be decoded.

        A logit is the gain of the key times the sum of two things: the product of the new query with the numbers of the
        code, and a constant of the query. To it comes the part of the mean, see :meth:`mean_logits`.

        Returns
        -------
        queries : Tensor, shape (R, Q, n)
        constants : Tensor, shape (R, Q, 1)
        """
        head_dim, device = coefficients.shape[-1], coefficients.device
        of_bits = steps(head_dim, bits, device)
        scaled = coefficients[..., : len(of_bits)] * of_bits
        return scaled, -(scaled @ middles(head_dim, bits, device))[..., None]

    def mean_logits(self, queries: Tensor, heads: Tensor) -> Tensor:
        """Products of queries (R, Q, D) with their head's mean at every position: (R, Q, n_positions), float32."""
        return self.rotary.products(queries, self.transform.mean[heads], self.n_positions)

    def _scaled(self, bits: int) -> Tensor:
        """Rows of the synthesis that have bits, times their steps: (H, n, D), float32."""
        synthesis = self.transform.synthesis
        of_bits = steps(synthesis.shape[-1], bits, synthesis.device)
        return synthesis[:, : len(of_bits)].float() * of_bits[:, None]

    def to(self, device: torch.device | str) -> KeyBasis:
        """The same basis on a device."""
        return KeyBasis(self.transform.to(device), self.rotary, self.n_positions)
