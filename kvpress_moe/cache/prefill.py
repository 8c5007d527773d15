"""One prefill, many caches: a prompt is prefilled once, and every press compresses a copy of its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kvpress.presses.base_press import BasePress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.cache import RaggedLayer
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.model.hooks import hooked
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import Attention, language_model
from kvpress_moe.model.transformers_api import attention_arguments, with_cache


class Prefill:
    """
    The full cache of a prompt, with everything that presses need to compress it.

    A press acts after a layer's attention, so its choice does not change what the layers above compute. So compressing
    a recorded prefill gives exactly the cache that the press would have left in a prefill of its own.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : Tensor, shape (B, S)
    on_layer : callable, optional
        Called without arguments after each layer, for a progress bar.

    Attributes
    ----------
    cache : DynamicCache
        The full cache.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, on_layer: Callable[[], Any] = lambda: None):
        teach_kvpress()
        self.model = model
        self.cache = DynamicCache()
        self._calls: list[tuple[nn.Module, dict[str, Any], Tensor | None]] = []

        def record(
            attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
        ) -> None:
            self._calls.append((attention, attention_arguments(attention, kwargs), output[1]))
            on_layer()

        attentions = [layer.self_attn for layer in language_model(model).layers]
        with torch.no_grad(), hooked(attentions, record):
            model.model(input_ids=input_ids.to(model.device), **with_cache(self.cache))

    def compress(self, press: BasePress | None) -> DynamicCache:
        """
        A new cache: compressed by ``press``, or a full copy for ``None``.

        This is for presses that shrink layers in ``compress`` (every ``ScorerPress``). It does not work for presses
        that only mask keys or that change the prefill.
        """
        cache = DynamicCache([(layer.keys, layer.values) for layer in self.cache.layers])  # copies
        if press is not None:
            with torch.no_grad(), press(self.model):
                for layer_idx, (attention, kwargs, attentions) in enumerate(self._calls):
                    layer = cache.layers[layer_idx]
                    arguments = (attention, kwargs["hidden_states"], layer.keys, layer.values, attentions)
                    layer.keys, layer.values = press.compress(*arguments, {**kwargs, "past_key_values": cache})
        fit_masks(cache, self.model.config.get_text_config(decoder=True))
        return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values in a cache, counted from its tensors."""
    layers: list[Any] = cache.layers
    return sum(
        layer.nbytes if isinstance(layer, RaggedLayer) else layer.keys.nbytes + layer.values.nbytes for layer in layers
    )
