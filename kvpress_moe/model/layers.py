"""Which models, layers and inputs the press serves. All checks run before any work is done."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeAlias

import torch
import transformers
from kvpress.presses.base_press import SUPPORTED_MODELS as KVPRESS_MODELS
from kvpress.presses.base_press import BasePress
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    QuantizedCache,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from kvpress_moe.errors import SettingError, UnsupportedInputError, UnsupportedModelError

PADDED = (
    "attention_mask: got a padded batch inside a wrapper, expected prompts of equal length without padding. After "
    "compression the mask would hide the wrong pairs. Use MoERouterPress without a wrapper, or run prompts one by one."
)

COMPILED = (
    "model: got a model compiled by torch.compile, expected the model as it was loaded. Compiled code does not see the "
    "hooks that compress. Prefill with the model itself inside the block; decode with the compiled one after it."
)

#: An attention module of any family; torch says of a module's attributes no more than ``Tensor | Module``.
Attention: TypeAlias = Any

SUPPORTED_MODELS = (
    *KVPRESS_MODELS,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

#: Those whose norms of queries and keys kvpress's own presses leave out, see :mod:`kvpress_moe.model.attention_view`.
UNKNOWN_NORMS = (OlmoeForCausalLM, Qwen3MoeForCausalLM)


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
    offloading = getattr(cache, "offloading", False)
    if (
        cache is None
        or offloading
        or isinstance(cache, QuantizedCache)
        or not isinstance(cache.layers[layer_idx], DynamicLayer)
    ):
        got = "an offloaded cache" if offloading else "no cache"
        got = got if cache is None or offloading else type(cache.layers[layer_idx]).__name__
        raise SettingError("budget", "layer or global", f"a DynamicCache, not {got}", "Use budget='uniform'.")


def check_can_serve_padding(cache: Cache | None, eager: bool, track_misses: bool) -> None:
    """
    Raise where a padded batch cannot be served: its rows keep different numbers of pairs, in ragged layers.

    Raises
    ------
    UnsupportedInputError
        With eager attention, ``track_misses`` or a cache that is not a plain DynamicCache.
    """
    if eager:
        limit, remedy = "attention that reads ragged layers, not eager", "Load it with attn_implementation='sdpa'."
    elif track_misses:
        limit, remedy = "track_misses=False, which needs rows of equal length", "Switch it off."
    elif cache is not None and not (type(cache) is DynamicCache and not cache.offloading):
        limit, remedy = f"a DynamicCache, not {type(cache).__name__}", "Use a DynamicCache."
    else:
        return
    raise UnsupportedInputError(
        f"attention_mask: got a padded batch, whose rows keep different numbers of pairs, expected {limit}. {remedy} "
        "Or run prompts one by one."
    )


def check_unmasked(attention: Attention, press: BasePress) -> None:
    """
    Raise if another press that is hooked in masks pairs of a layer by their index, which an eviction would change.

    Raises
    ------
    UnsupportedInputError
    """
    if getattr(attention, "masked_key_indices", None) is None:
        return
    hooked = [getattr(hook, "__self__", None) for hook in attention._forward_hooks.values()]
    if any(isinstance(other, BasePress) and other is not press for other in hooked):
        raise UnsupportedInputError(
            f"press: another press masks pairs of layer {attention.layer_idx}, expected to be alone; after an eviction "
            "its mask would hide others. Leave its `with` block first."
        )


def check_still_there(cache: Cache, n_judged: dict[int, int]) -> None:
    """
    Raise if another press evicted pairs of layers that wait for a shared budget.

    Parameters
    ----------
    cache : Cache
    n_judged : dict of int -> int
        Pairs that each layer held when it was judged.

    Raises
    ------
    UnsupportedInputError
    """
    for layer_idx, n_pairs in n_judged.items():
        n_left = cache.layers[layer_idx].get_seq_length()
        if n_left != n_pairs:
            raise UnsupportedInputError(
                f"press: another press evicted pairs of layer {layer_idx} ({n_left} of {n_pairs} are left) before the "
                "shared budget was decided, expected to be alone. Leave its `with` block first."
            )


def is_compiled(module: Any) -> bool:
    """Whether a module was compiled, by ``torch.compile(module)``, in place, or by its forward."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    )


def check_model(model: PreTrainedModel) -> None:
    """
    Raise if the press cannot serve a model.

    Raises
    ------
    UnsupportedModelError
        For a class that kvpress's scorers do not understand, a compiled model, flex attention, or sliding-window layers
        only.
    """
    if is_compiled(model):
        raise UnsupportedModelError(COMPILED)
    if not isinstance(model, SUPPORTED_MODELS):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, expected one of "
            f"{', '.join(sorted(supported.__name__ for supported in SUPPORTED_MODELS))}. "
            "Scorers would compute wrong queries for other classes, without a word."
        )
    stack = language_model(model)
    if any(map(is_compiled, (model.model, stack, *stack.layers, *(layer.self_attn for layer in stack.layers)))):
        raise UnsupportedModelError(COMPILED)
    if not hasattr(stack.layers[0].self_attn, "scaling"):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__} of transformers {transformers.__version__}, whose attention is of an "
            "older make that cannot read ragged layers, expected a newer one. Install transformers 5.2."
        )
    if model.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError(
            "model: got attn_implementation='flex_attention', which fails once kvpress 0.5.5 is imported (it "
            "passes the dropout in the place of the scaling), expected another. Load it with 'sdpa'."
        )
    config = model.config.get_text_config(decoder=True)
    if not full_attention_layers(model):
        raise UnsupportedModelError(
            f"model: every layer of this {type(model).__name__} attends to a sliding window of {config.sliding_window} "
            "tokens, expected at least one layer with full attention. For prompts shorter than the window, load it "
            "with sliding_window=None."
        )


def forward_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward pass by name, as a pre-hook gets them."""
    named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    named |= named.pop("kwargs", {})  # what forward takes as **kwargs
    return named


def check_forward(model: Any, kwargs: dict[str, Any]) -> bool:
    """
    Raise on arguments of a forward pass below the head that would be compressed wrongly without a word.

    Returns
    -------
    bool
        Whether a prompt is read into an empty cache, which is what a press compresses.

    Raises
    ------
    UnsupportedInputError
        For an empty prompt, ``use_cache=False``, a StaticCache, or a QuantizedCache with layers that slide.
    """
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        return False  # the model itself complains
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
    config = model.config.get_text_config(decoder=True)
    if isinstance(cache, QuantizedCache) and any(slides(config, i) for i in range(config.num_hidden_layers)):
        raise UnsupportedInputError(
            "past_key_values: got a QuantizedCache for a model with sliding-window layers, expected a cache whose "
            "masks fit layers of different lengths. Use a DynamicCache."
        )
    if cache is not None and cache.get_seq_length() > 0:
        if inputs.shape[1] > 1:
            warnings.warn(
                f"{inputs.shape[1]} tokens meet a cache that already holds {cache.get_seq_length()}: they are not "
                "compressed, as kvpress compresses a prompt that is prefilled in one pass into an empty cache only. "
                "(Chunked prefill, a second turn, or a question asked inside the `with` block.)",
                stacklevel=2,
            )
        return False
    return True


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
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2] and hides_tokens(mask):
        raise UnsupportedInputError(PADDED)


def hides_tokens(mask: Tensor) -> bool:
    """Whether a mask (B, 1, Q, S), bool or additive, hides any of the S tokens from the newest one, as padding does."""
    newest = mask[:, 0, -1]
    return not bool((newest if newest.dtype == torch.bool else newest == 0).all())
