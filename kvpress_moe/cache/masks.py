"""Cache layers that give transformers the right masks after an eviction has shortened them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvpress_moe.model.layers import slides


class ShortenedLayer(DynamicLayer):
    """
    A DynamicLayer after eviction. New tokens come after all cached pairs, whatever their positions are.

    transformers compares cache indices with ``cache_position`` to build causal masks. In ``generate``, and in Gemma 3
    with its layers of different lengths, ``cache_position`` counts all tokens of the prompt, but the cache holds fewer.
    Then the tokens of a question would see later tokens of the question.
    """

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        """Number of keys, and the offset that puts the first new token directly after the cached ones."""
        cached = self.get_seq_length()
        return cached + cache_position.shape[0], int(cache_position[0]) - cached


class WholeSlidingLayer(DynamicLayer):
    """
    A DynamicLayer that holds a whole prompt for a layer with sliding-window attention.

    A cache that was made without the model's configuration does not know which layers slide. transformers then uses one
    mask for all layers, with the size of layer 0.
    """

    is_sliding = True


def fit_masks(cache: Cache, config: Any) -> None:
    """
    Change plain DynamicLayers, in place, into layers with the right masks. Other kinds of layers stay as they are.

    It is done in place because kvpress's hook holds the layer object and fills it after ``compress``.
    """
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            layer.__class__ = WholeSlidingLayer if slides(config, layer_idx) else ShortenedLayer


def fit_masks_after_forward(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model without its head. It also covers the layers after the last compressed layer."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and any(isinstance(layer, ShortenedLayer) for layer in cache.layers):
        fit_masks(cache, model.config.get_text_config(decoder=True))
