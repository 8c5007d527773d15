"""The layers of a model: which of them slide, which are compressed, and their rotary embedding."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

#: An attention module of any model family. To torch's types its attributes are only ``Tensor | Module``.
Attention: TypeAlias = Any


def language_model(model: PreTrainedModel) -> Any:
    """The stack of decoder layers inside a causal or multimodal model."""
    return getattr(model.model, "language_model", model.model)


def attn_implementation(model: PreTrainedModel) -> str:
    """The attention implementation that the decoder layers use now; parts of a model may have different ones."""
    implementation: str = language_model(model).layers[0].self_attn.config._attn_implementation
    return implementation


def slides(config: Any, layer_idx: int) -> bool:
    """Whether a layer attends to a sliding window only. Its cache is bounded anyway, so it is not compressed."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        layer_type: str = layer_types[layer_idx]
        return layer_type == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers that attend to all earlier tokens. These are the layers that the press compresses."""
    config = model.config.get_text_config(decoder=True)
    return [layer_idx for layer_idx in range(config.num_hidden_layers) if not slides(config, layer_idx)]


def some_layers_slide(model: PreTrainedModel) -> bool:
    """Whether any layer of a model attends to a sliding window."""
    n_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return len(full_attention_layers(model)) < n_layers


def full_attentions(model: PreTrainedModel) -> list[Any]:
    """The attention modules of :func:`full_attention_layers`."""
    layers = language_model(model).layers
    return [layers[layer_idx].self_attn for layer_idx in full_attention_layers(model)]


def first_to_compress(attention: Attention) -> bool:
    """Whether an attention layer is the first of its model that does not slide."""
    layer_idx = attention.layer_idx
    return not slides(attention.config, layer_idx) and all(slides(attention.config, i) for i in range(layer_idx))


def last_to_compress(attention: Attention) -> bool:
    """Whether an attention layer is the last of its model that does not slide."""
    layer_idx, config = attention.layer_idx, attention.config
    return not slides(config, layer_idx) and all(
        slides(config, i) for i in range(layer_idx + 1, config.num_hidden_layers)
    )


def own_layer_type(module: Attention) -> str | None:
    """The layer type that Gemma 3's rotary embedding has to be told. None for models whose embedding needs no type."""
    of_type = isinstance(module, Gemma3Attention) and hasattr(module, "layer_type")  # transformers 5
    return cast(str, module.layer_type) if of_type else None


class _OfLayerType(nn.Module):
    """A rotary embedding that gets the layer's type even if its caller does not pass it."""

    def __init__(self, rotary_emb: nn.Module, layer_type: str):
        super().__init__()
        self.rotary_emb, self.layer_type = rotary_emb, layer_type

    def forward(self, states: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        return self.rotary_emb(states, position_ids, layer_type or self.layer_type)


def of_layer(rotary_emb: nn.Module, attention: Attention) -> nn.Module:
    """A rotary embedding that presses can call in the same way for every model."""
    layer_type = own_layer_type(attention)
    return rotary_emb if layer_type is None else _OfLayerType(rotary_emb, layer_type)
