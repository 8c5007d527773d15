"""Checks that refuse inputs, caches and other presses that the press cannot serve."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from kvpress.presses.base_press import BasePress
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from kvpress_moe.errors import SettingError, UnsupportedInputError, UnsupportedModelError
from kvpress_moe.experts.expert import Expert
from kvpress_moe.model.attention import hides_tokens
from kvpress_moe.model.layers import Attention, slides
from kvpress_moe.model.transformers_api import given_cache

PADDED = (
    "attention_mask: got a padded batch inside a wrapper, expected prompts of equal length without padding. After "
    "compression the mask would hide the wrong pairs. Use MoERouterPress without a wrapper, or run prompts one by one."
)


def check_can_turn_ragged(
    cache: Cache | None, layer_idx: int, inside_wrapper: bool, field: str = "budget", got: str = "layer or global"
) -> None:
    """
    Raise if layers cannot be replaced by ragged or packed ones. ``field`` and ``got`` name the setting.

    Raises
    ------
    SettingError
        Inside a wrapper, which stores the result itself, or for a cache that is not a plain DynamicCache.
    """
    if inside_wrapper:
        allowed = "None" if field == "precision" else "'uniform'"
        raise SettingError(
            field,
            got,
            f"{allowed} inside a kvpress wrapper, which stores layers of equal heads",
            "Use MoERouterPress without a wrapper.",
        )
    offloading = getattr(cache, "offloading", False)
    if (
        cache is None
        or offloading
        or isinstance(cache, QuantizedCache)
        or not isinstance(cache.layers[layer_idx], DynamicLayer)
    ):
        cannot = "an offloaded cache" if offloading else "no cache"
        cannot = cannot if cache is None or offloading else type(cache.layers[layer_idx]).__name__
        remedy = "Use budget='uniform'." if field == "budget" else f"Use a DynamicCache, or {field}=None."
        raise SettingError(field, got, f"a DynamicCache, not {cannot}", remedy)


def check_can_serve_padding(cache: Cache | None, eager: bool, track_misses: bool) -> None:
    """
    Raise if a padded batch cannot be served. Its rows keep different numbers of pairs, which needs ragged layers.

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
    Raise if another active press masks pairs of a layer by their index. An eviction would change these indices.

    Raises
    ------
    UnsupportedInputError
    """
    if getattr(attention, "masked_key_indices", None) is None:
        return
    hooked = [getattr(hook, "__self__", None) for hook in attention._forward_hooks.values()]
    if any(isinstance(other, BasePress) and other is not press for other in hooked):
        raise UnsupportedInputError(
            f"press: another press masks pairs of layer {attention.layer_idx}, expected no other press; after an "
            "eviction its mask would hide the wrong pairs. Leave its `with` block first."
        )


def check_still_there(cache: Cache, n_judged: dict[int, int]) -> None:
    """
    Raise if another press evicted pairs of layers that wait for a shared budget.

    Parameters
    ----------
    cache : Cache
    n_judged : dict of int -> int
        Number of pairs that each layer held when it was judged.

    Raises
    ------
    UnsupportedInputError
    """
    for layer_idx, n_pairs in n_judged.items():
        n_left = cache.layers[layer_idx].get_seq_length()
        if n_left != n_pairs:
            raise UnsupportedInputError(
                f"press: another press evicted pairs of layer {layer_idx} ({n_left} of {n_pairs} are left) before the "
                "shared budget was decided, expected no other press. Leave its `with` block first."
            )


def forward_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward pass by name, from what a pre-hook gets."""
    named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    named |= named.pop("kwargs", {})  # arguments that forward accepts as **kwargs
    return named


def check_forward(model: Any, kwargs: dict[str, Any]) -> bool:
    """
    Raise if arguments of the forward pass (of the model without its head) would be compressed wrongly and silently.

    Returns
    -------
    bool
        Whether a prompt is prefilled into an empty cache. This is what a press compresses.

    Raises
    ------
    UnsupportedInputError
        For an empty prompt, gradient checkpointing, ``use_cache=False``, drafts of assisted decoding, a StaticCache, or
        a QuantizedCache with layers that slide.
    """
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        return False  # the model itself raises an error
    if inputs.shape[1] == 0:
        raise UnsupportedInputError(
            f"input_ids: got a prompt without tokens, shape {tuple(inputs.shape)}, expected at least one token. "
            "Check the tokenizer's input."
        )
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in model_layers(model)):
        raise UnsupportedInputError(
            "model: got gradient checkpointing in training mode, which switches the cache off, expected a model that "
            "fills its cache. Call model.eval(), or model.gradient_checkpointing_disable()."
        )
    cache = given_cache(kwargs)
    if kwargs.get("use_cache") is False or (
        cache is None and not getattr(model.config.get_text_config(), "use_cache", True)
    ):
        raise UnsupportedInputError(
            "use_cache: got False, expected True. A press compresses the cache, so it needs one."
        )
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
                f"{inputs.shape[1]} tokens meet a cache that already holds {cache.get_seq_length()} tokens. They are "
                "not compressed. As in kvpress, only a prompt that is prefilled in one pass into an empty cache is "
                "compressed. (Reasons can be: Chunked prefill, a second turn, or a question in the `with` block.)",
                stacklevel=2,
            )
        return False
    if _inside_assisted_decoding():
        raise UnsupportedInputError(
            "generate: got assisted decoding or prompt lookup inside the block, expected a prompt without drafts. "
            "Drafts would be compressed with the prompt, and rejected ones would stay in the cache. Prefill inside the "
            "block, then call generate with the compressed cache after it."
        )
    return True


def _inside_assisted_decoding() -> bool:
    """Whether this forward pass is called by ``generate`` with drafts; no argument of the model says so."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            return True
        frame = frame.f_back
    return False


def check_mask(mask: Tensor | None) -> None:
    """
    Raise if a prompt's attention mask hides tokens from its last token. For calls from inside a wrapper.

    Parameters
    ----------
    mask : Tensor, shape (B, 1, Q, S), bool or additive; or None
        Mask of a layer with full attention. Only a square mask is checked, because a prompt's mask is square.

    Raises
    ------
    UnsupportedInputError
        For padding.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2] and hides_tokens(mask):
        raise UnsupportedInputError(PADDED)


def check_attention(
    eager: bool,
    experts: Sequence[Expert],
    budget: str | None,
    precision: Any = None,
    max_kl: float | None = None,
) -> None:
    """
    Raise if experts, budget, precision or promise need another kind of attention than the model was loaded with.

    Raises
    ------
    SettingError
        For ``observed_attention`` without eager attention; for a budget that heads share, a precision, or ``max_kl``
        with it.
    """
    if not eager and any(expert.name == "observed_attention" for expert in experts):
        raise SettingError(
            "experts",
            "observed_attention",
            "a model with eager attention, the only one that returns attention weights",
            "Load it with attn_implementation='eager'.",
        )
    if eager and budget not in (None, "uniform"):
        raise SettingError(
            "budget",
            budget,
            "'uniform' with eager attention, which transformers does not let others replace",
            "Load the model with attn_implementation='sdpa'.",
        )
    check_sees_codes(eager, precision, max_kl)


def check_sees_codes(eager: bool, precision: Any, max_kl: float | None = None) -> None:
    """Raise SettingError if attention is eager, which cannot see codes, and there is a precision or a promise."""
    if eager and max_kl is not None:
        raise SettingError(
            "max_kl",
            max_kl,
            "None with eager attention, which transformers does not let others replace",
            "Load the model with attn_implementation='sdpa'.",
        )
    if eager and precision is not None:
        raise SettingError(
            "precision",
            precision,
            "None with eager attention, which transformers does not let others replace",
            "Load the model with attn_implementation='sdpa'.",
        )


def check_wrapped(
    attention: Attention, compression_ratio: float | None, precision: Any = None, max_kl: float | None = None
) -> None:
    """
    Raise if a wrapper of kvpress asks for scores that it could not use correctly.

    Raises
    ------
    SettingError
        If ``compression_ratio`` is None, because the wrapper reads its budget from this setting, or if ``precision`` is
        set, because the wrapper stores keys and values itself, or if ``max_kl`` is set.
    UnsupportedModelError
        If the layer has sliding-window attention. The wrapper would evict from it.
    """
    if compression_ratio is None:
        raise SettingError(
            "compression_ratio",
            None,
            "a number inside a kvpress wrapper, which reads the budget from it",
            "Set press.compression_ratio, or use MoERouterPress without a wrapper.",
        )
    if precision is not None:
        raise SettingError(
            "precision",
            precision,
            "None inside a kvpress wrapper, which stores keys and values itself",
            "Use MoERouterPress without a wrapper.",
        )
    if max_kl is not None:
        raise SettingError(
            "max_kl",
            max_kl,
            "None inside a kvpress wrapper, which decides how much is kept",
            "Use MoERouterPress without a wrapper.",
        )
    if slides(attention.config, attention.layer_idx):
        raise UnsupportedModelError(
            f"model: layer {attention.layer_idx} has sliding-window attention, expected layers with full attention "
            "inside this wrapper, which would evict from it. Use MoERouterPress without a wrapper."
        )


def has_eager_attention(model: Any) -> bool:
    """Whether a model below its head computes attention eagerly, now."""
    implementation: str = model_layers(model)[0].self_attn.config._attn_implementation
    return implementation == "eager"


def model_layers(model: Any) -> Any:
    """The decoder layers of a model below its head."""
    return getattr(model, "language_model", model).layers


def warn_of_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the whole model: what a loss inside the block does not measure."""
    if kwargs.get("labels") is not None:
        warnings.warn(
            "labels: the loss inside the block is that of the full cache. A press acts after a layer's attention. It "
            "changes what later tokens see, not the prompt's own logits. To measure a press, prefill inside the "
            "block, then pass the text that follows with the compressed cache.",
            stacklevel=2,
        )
