"""Which models the press serves."""

from __future__ import annotations

from typing import Any

import transformers
from kvpress.presses.base_press import SUPPORTED_MODELS as KVPRESS_MODELS
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from kvpress_moe.errors import UnsupportedModelError
from kvpress_moe.model.layers import attn_implementation, full_attention_layers, language_model

COMPILED = (
    "model: got a model compiled by torch.compile, expected the model as it was loaded. Compiled code does not see the "
    "hooks that compress. Prefill with the model itself inside the block; decode with the compiled one after it."
)


#: Classes that only newer releases of transformers have, by name. Their attention is that of a supported class.
_NEWER = ("MinistralForCausalLM",)

SUPPORTED_MODELS = (
    *KVPRESS_MODELS,
    *(getattr(transformers, name) for name in _NEWER if hasattr(transformers, name)),
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)


#: Models whose norms of queries and keys kvpress's presses do not apply, see :mod:`kvpress_moe.model.attention_view`.
UNKNOWN_NORMS = (OlmoeForCausalLM, Qwen3MoeForCausalLM)


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
        For a class that kvpress's scorers do not support, a compiled model, attention that does not use transformers'
        attention interface, flex attention, or a model with sliding-window layers only.
    """
    if is_compiled(model):
        raise UnsupportedModelError(COMPILED)
    if not isinstance(model, SUPPORTED_MODELS) and hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, a model that is wrapped by PEFT, expected the model inside. Use "
            "`with press(model.get_base_model()):`; its adapters are part of it, and the wrapped model may be called."
        )
    if not isinstance(model, SUPPORTED_MODELS):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, expected one of "
            f"{', '.join(sorted(supported.__name__ for supported in SUPPORTED_MODELS))}. "
            "For other classes, scorers would silently compute wrong queries."
        )
    stack = language_model(model)
    if any(map(is_compiled, (model.model, stack, *stack.layers, *(layer.self_attn for layer in stack.layers)))):
        raise UnsupportedModelError(COMPILED)
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    indices = [getattr(layer.self_attn, "layer_idx", None) for layer in stack.layers]
    if indices != list(range(n_layers)):
        raise UnsupportedModelError(
            f"model: got {len(indices)} decoder layers numbered {_shortly(indices)}, expected those of the "
            f"configuration, 0 to {n_layers - 1}. After layers were removed, set config.num_hidden_layers to their "
            "number and each self_attn.layer_idx to its place."
        )
    if not hasattr(stack.layers[0].self_attn, "scaling"):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__} of transformers {transformers.__version__}, whose attention is of an "
            "older make that cannot read ragged layers, expected a newer one. Install transformers 5.2."
        )
    if attn_implementation(model) == "flex_attention":
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


def _shortly(indices: list[int | None]) -> str:
    shown = ", ".join(map(str, indices[:4]))
    return f"{shown}, …" if len(indices) > 4 else shown
