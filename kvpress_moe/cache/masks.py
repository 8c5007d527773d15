"""Cache layers that give transformers the right masks after an eviction has shortened them."""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.cache.shortened_layer import ShortenedLayer
from kvpress_moe.model.layers import slides
from kvpress_moe.model.transformers_api import returned_cache


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


def count_evicted(cache: Cache, n_read: int) -> None:
    """
    Let shortened layers, in place, count the pairs that any press has evicted from the prompt that was just read.

    Parameters
    ----------
    cache : Cache
    n_read : int
        Number of tokens of the prompt.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "n_stored") and not isinstance(layer, RaggedLayer) and layer.n_stored < n_read:
            layer.n_evicted, layer.n_read = n_read - layer.n_stored, n_read


def fit_masks_after_forward(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model without its head. It also covers the layers after the last compressed layer."""
    cache = returned_cache(output)
    if cache is not None and any(isinstance(layer, (RaggedLayer, ShortenedLayer)) for layer in cache.layers):
        fit_masks(cache, model.config.get_text_config(decoder=True))
