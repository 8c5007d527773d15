"""Coded pairs: what every code of a menu does to the keys and values of a prompt, for end-to-end tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress_moe.codes.distortion import Distortion, distortions
from kvpress_moe.codes.key_transform import KeyBasis, KeyTransform
from kvpress_moe.codes.precision import WHOLE, Precision
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.transform_codes import TRANSFORM_BITS, encode_coefficients
from kvpress_moe.codes.vector_codes import encode
from kvpress_moe.model.layers import language_model, of_layer
from kvpress_moe.press.packing import basis_at


@dataclass(frozen=True)
class CodedPairs:
    """
    The errors of all codes of a menu, for one layer of a prompt.

    Attributes
    ----------
    keys, values : mapping of int -> Tensor, each (H, S, D)
        By the number of bits: decoded minus original.
    distortion : Distortion
        What a router is told of these errors, (1, H, S) each.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    distortion: Distortion

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        menu: Sequence[Precision],
        scaling: float,
        power: Tensor,
        basis: KeyBasis | None,
    ) -> CodedPairs:
        """
        Code and decode the pairs (1, H, S, D) of a prompt without padding.

        The parameters are those of :func:`kvpress_moe.codes.distortion.distortions`.
        """
        positions = torch.arange(keys.shape[2], device=keys.device)
        lost = distortions(keys, values, menu, scaling, power, basis, positions[None])
        of_keys, of_values = {}, {}
        for bits in sorted({precision.key_bits for precision in menu} - {WHOLE}):
            if basis is not None and bits in TRANSFORM_BITS:
                coefficients = basis.coefficients(keys, positions[None])[0]
                coded = [encode_coefficients(head, positions, bits, basis.n_positions) for head in coefficients]
                decoded = torch.stack([basis.restore(one, head) for head, one in enumerate(coded)])
            else:
                decoded = _decoded(keys[0], bits)
            of_keys[bits] = decoded.to(keys) - keys[0]
        for bits in sorted({precision.value_bits for precision in menu} - {WHOLE}):
            of_values[bits] = _decoded(values[0], bits).to(values) - values[0]
        return cls(of_keys, of_values, lost)

    def mixed(
        self, keys: Tensor, values: Tensor, log_probs: Tensor, menu: Sequence[Precision]
    ) -> tuple[Tensor, Tensor]:
        """
        Keys and values (1, H, S, D) as a soft choice of strategies leaves them.

        Parameters
        ----------
        keys, values : Tensor, shape (1, H, S, D)
        log_probs : Tensor, shape (M + 1, H, S)
            The first strategy evicts. What is left is divided among the others.
        menu : sequence of M Precision
        """
        shares = log_probs[1:].softmax(0).to(keys)
        return (
            keys + _added(self.keys, shares, [precision.key_bits for precision in menu]),
            values + _added(self.values, shares, [precision.value_bits for precision in menu]),
        )


def _decoded(vectors: Tensor, bits: int) -> Tensor:
    turn = rotation(vectors.shape[-1], vectors.device)
    decoded: Tensor = (encode(vectors.flatten(0, 1), bits).decode() @ turn.T).view(vectors.shape)
    return decoded


def _added(errors: Mapping[int, Tensor], shares: Tensor, bits: Sequence[int]) -> Tensor:
    added: Any = 0.0
    for number, error in errors.items():
        with_these = [share for share, of_menu in zip(shares, bits, strict=True) if of_menu == number]
        added = added + torch.stack(with_these).sum(0)[..., None] * error
    return torch.as_tensor(added, device=shares.device)


def layer_basis(
    model: PreTrainedModel, layer_idx: int, transforms: Mapping[int, KeyTransform] | None, n_tokens: int
) -> KeyBasis | None:
    """The basis of a layer's keys for a prompt of ``n_tokens``. None if there are no transforms."""
    if not transforms:
        return None
    stack = language_model(model)
    rotary_emb = of_layer(stack.rotary_emb, stack.layers[layer_idx].self_attn)
    return basis_at(transforms[layer_idx].to(model.device), rotary_emb, n_tokens)
