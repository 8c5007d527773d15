"""RaggedCache: a cache whose layers hold heads of different lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.layers import full_attention_layers, language_model


class RaggedCache(DynamicCache):
    """
    A cache with ragged layers.

    With ``MoERouterPress(budget="layer")`` or ``"global"`` the layers of the DynamicCache in use become ragged by
    themselves. This class makes ragged caches from other caches.
    """

    @classmethod
    def from_kept(cls, cache: Cache, kept: Callable[[int], Tensor | None]) -> RaggedCache:
        """
        Copy a cache, and keep only some of its pairs.

        Parameters
        ----------
        cache : Cache
            A cache with dense layers.
        kept : callable
            Layer index -> bool (B, H, S). None means that the whole layer is copied (sliding windows).
        """
        ragged = cls()
        layers: list[Any] = cache.layers
        for layer_idx, layer in enumerate(layers):
            mask = kept(layer_idx)
            ragged.layers.append(
                copy.copy(layer) if mask is None else RaggedLayer.from_dense(layer.keys, layer.values, mask)
            )
        return ragged

    @classmethod
    def from_dynamic(cls, cache: Cache) -> RaggedCache:
        """All pairs of a dense cache, in ragged layers."""
        layers: list[Any] = cache.layers
        return cls.from_kept(cache, lambda i: torch.ones_like(layers[i].keys[..., 0], dtype=torch.bool))

    @classmethod
    def from_masked(cls, model: PreTrainedModel, cache: Cache) -> RaggedCache:
        """
        Free the memory of pairs that a kvpress press masked (AdaKVPress, CriticalAdaKVPress, DMSPress, KVzipPress, …).

        Layers with sliding-window attention stay as they are, whatever was masked there, because ragged attention does
        not support windows.

        Parameters
        ----------
        model : PreTrainedModel
            Its attention layers hold ``masked_key_indices``. These are removed, because they index the full cache.
        cache : Cache
            The cache that was masked.
        """
        layers: list[Any] = cache.layers
        attentions = [layer.self_attn for layer in language_model(model).layers]
        full = full_attention_layers(model)

        def kept(layer_idx: int) -> Tensor | None:
            if layer_idx not in full:
                return None
            mask = torch.ones_like(layers[layer_idx].keys[..., 0], dtype=torch.bool)
            indices = getattr(attentions[layer_idx], "masked_key_indices", None)
            if indices is not None:
                mask[tuple(index.to(mask.device) for index in indices)] = False
            return mask

        ragged = cls.from_kept(cache, kept)
        for attention in attentions:
            attention.masked_key_indices = None
        fit_masks(ragged, model.config.get_text_config(decoder=True))
        return ragged

    def to_dynamic(self) -> DynamicCache:
        """
        A dense cache of the same pairs.

        Raises
        ------
        UnsupportedInputError
            If heads of a layer have different lengths.
        """
        pairs = []
        for layer_idx, layer in enumerate(self.layers):
            if not isinstance(layer, RaggedLayer):
                pairs.append((layer.keys, layer.values))
                continue
            if len({length for heads in layer.lengths for length in heads}) > 1:
                raise UnsupportedInputError(
                    f"layer {layer_idx}: got heads of {sorted({n for heads in layer.lengths for n in heads})} pairs, "
                    "expected equal lengths. A dense cache cannot hold them."
                )
            shape = (*layer.new_keys.shape[:2], -1, layer.flat_keys.shape[-1])
            keys = torch.cat((layer.flat_keys.view(shape), layer.new_keys), dim=2)
            pairs.append((keys, torch.cat((layer.flat_values.view(shape), layer.new_values), dim=2)))
        return DynamicCache(pairs)
