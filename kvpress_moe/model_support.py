"""Which models, layers and inputs the press serves. All checks run before any work is done."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeAlias

import torch
from kvpress.presses.base_press import SUPPORTED_MODELS as KVPRESS_MODELS
from torch import Tensor
from transformers import Cache, Gemma3ForCausalLM, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from kvpress_moe.errors import SettingError, UnsupportedInputError, UnsupportedModelError

PADDED = (
    "attention_mask: got a padded batch, expected prompts of equal length without padding. After compression the mask "
    "would hide the wrong pairs. Run prompts of different lengths one by one."
)

#: An attention module of any family; torch says of a module's attributes no more than ``Tensor | Module``.
Attention: TypeAlias = Any

SUPPORTED_MODELS = (*KVPRESS_MODELS, Gemma3ForCausalLM)


def language_model(model: PreTrainedModel) -> Any:
    """The stack of decoder layers inside a causal or multimodal model."""
    return getattr(model.model, "language_model", model.model)


def slides(config: Any, layer_idx: int) -> bool:
    """Whether a layer attends to a sliding window only (such a layer's cache is bounded anyway and is left alone)."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        layer_type: str = layer_types[layer_idx]
        return layer_type == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers that attend to everything before, those that the press compresses."""
    config = model.config.get_text_config(decoder=True)
    return [layer_idx for layer_idx in range(config.num_hidden_layers) if not slides(config, layer_idx)]


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


def check_can_turn_ragged(cache: Cache | None, layer_idx: int, inside_wrapper: bool) -> None:
    """
    Raise where layers cannot be replaced by ragged ones.

    Raises
    ------
    SettingError
        Inside a wrapper, which stores the result itself, or for a cache that is not a plain DynamicCache.
    """
    if inside_wrapper:
        raise SettingError(
            "budget",
            "layer or global",
            "'uniform' inside a kvpress wrapper, which stores layers of equal heads",
            "Use MoERouterPress without a wrapper.",
        )
    if cache is None or isinstance(cache, QuantizedCache) or not isinstance(cache.layers[layer_idx], DynamicLayer):
        got = "no cache" if cache is None else type(cache.layers[layer_idx]).__name__
        raise SettingError("budget", "layer or global", f"a DynamicCache, not {got}", "Use budget='uniform'.")


def check_model(model: PreTrainedModel) -> None:
    """
    Raise if the press cannot serve a model.

    Raises
    ------
    UnsupportedModelError
        For a class that kvpress's scorers do not understand, or a model with sliding-window layers only.
    """
    if not isinstance(model, SUPPORTED_MODELS):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, expected one of "
            f"{', '.join(sorted(supported.__name__ for supported in SUPPORTED_MODELS))}. "
            "Scorers would compute wrong queries for other classes, without a word."
        )
    config = model.config.get_text_config(decoder=True)
    if not full_attention_layers(model):
        raise UnsupportedModelError(
            f"model: every layer of this {type(model).__name__} attends to a sliding window of {config.sliding_window} "
            "tokens, expected at least one layer with full attention. For prompts shorter than the window, load it "
            "with sliding_window=None."
        )


def check_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Forward pre-hook of the model below its head: raise on inputs that would be compressed wrongly without a word.

    Raises
    ------
    UnsupportedInputError
        For an empty prompt, padding in the prompt, ``use_cache=False``, or a StaticCache.
    """
    kwargs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    kwargs |= kwargs.pop("kwargs", {})  # what forward takes as **kwargs
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        return  # the model itself complains
    if inputs.shape[1] == 0:
        raise UnsupportedInputError(
            f"input_ids: got a prompt without tokens, shape {tuple(inputs.shape)}, expected at least one token. "
            "Check the tokenizer's input."
        )
    cache = kwargs.get("past_key_values")
    if kwargs.get("use_cache") is False or (
        cache is None and not getattr(model.config.get_text_config(), "use_cache", True)
    ):
        raise UnsupportedInputError("use_cache: got False, expected True. A press compresses the cache; give it one.")
    if isinstance(cache, StaticCache):
        raise UnsupportedInputError(
            "past_key_values: got a StaticCache, expected a cache that can shrink. Use a DynamicCache."
        )
    if cache is not None and cache.get_seq_length() > 0:
        if inputs.shape[1] > 1:
            warnings.warn(
                f"{inputs.shape[1]} tokens meet a cache that already holds {cache.get_seq_length()}: they are not "
                "compressed, as kvpress compresses a prompt that is prefilled in one pass into an empty cache only. "
                "(Chunked prefill, a second turn, or a question asked inside the `with` block.)",
                stacklevel=2,
            )
        return
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        raise UnsupportedInputError(PADDED)


def check_mask(mask: Tensor | None) -> None:
    """
    Raise if a prompt's attention mask hides tokens from its last one; for calls from inside a wrapper.

    Parameters
    ----------
    mask : Tensor, shape (B, 1, Q, S), bool or additive; or None
        Of a layer with full attention. Only a prompt's is looked at, which is square.

    Raises
    ------
    UnsupportedInputError
        For padding.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return
    newest = mask[:, 0, -1]
    if not bool((newest if newest.dtype == torch.bool else newest == 0).all()):
        raise UnsupportedInputError(PADDED)
