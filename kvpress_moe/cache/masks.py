"""Cache layers that give transformers the right masks after layers were shortened."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvpress_moe.model.layers import slides


class ShortenedLayer(DynamicLayer):
    """
    A DynamicLayer after eviction: new tokens come after everything that is cached, whatever their positions say.

    transformers compares cache indices with ``cache_position`` to build causal masks. Where that counts the tokens
    read (``generate``, Gemma 3 with its layers of different lengths) and the cache holds fewer, the tokens of a
    question would see each other's future.
    """

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        """Length of keys, and the offset that puts the first new token right behind the cached ones."""
        cached = self.get_seq_length()
        return cached + cache_position.shape[0], int(cache_position[0]) - cached


class WholeSlidingLayer(DynamicLayer):
    """
    A DynamicLayer that holds a whole prompt for a layer with sliding-window attention.

    A cache made without the model's configuration does not know which layers slide; transformers then takes one mask,
    sized by layer 0, for all.
    """

    is_sliding = True


def fit_masks(cache: Cache, config: Any) -> None:
    """
    Turn plain DynamicLayers, in place, into layers whose masks fit; leave other kinds of layers alone.

    In place, because kvpress's hook holds the layer object and fills it after ``compress``.
    """
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            layer.__class__ = WholeSlidingLayer if slides(config, layer_idx) else ShortenedLayer


def fit_masks_after_forward(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model below its head: layers that came after the last compressed one fit too."""
    cache = getattr(output, "past_key_values", None)
    if cache is not None and any(isinstance(layer, ShortenedLayer) for layer in cache.layers):
        fit_masks(cache, model.config.get_text_config(decoder=True))
