"""Attention over a RaggedLayer, connected to transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpress_moe.cache.packed_attention import (
    can_attend_together,
    of_similar_length,
    packed_attention,
    packed_attention_together,
)
from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.errors import SettingError, UnsupportedInputError
from kvpress_moe.model.attention import hides_tokens, softcap

#: ``(query, layer, scaling, cap) -> output``, see :func:`kvpress_moe.cache.torch_backend.torch_attention`.
RaggedAttention = Callable[[Tensor, RaggedPairs, float, float | None], Tensor]

_in_use: RaggedAttention = torch_attention

#: Attention over ragged layers -> attention over packed layers that belongs to it. For others: plain PyTorch.
PACKED: dict[RaggedAttention, Callable[..., Tensor]] = {}

#: The same for one new token of each of several packed layers. For others: one layer after the other.
TOGETHER: dict[RaggedAttention, Callable[..., Tensor]] = {torch_attention: packed_attention_together}


def use_ragged_attention(attention: str | RaggedAttention) -> RaggedAttention:
    """
    Choose the function that computes attention over ragged layers, in all threads, from now on.

    Parameters
    ----------
    attention : {"torch", "compiled", "triton"} or callable
        ``"torch"``, the default, is plain PyTorch on any device. ``"compiled"`` is for packed layers on a CPU: a small
        C library, which the machine's C compiler builds on the first call, in about a second; see
        :mod:`kvpress_moe.cache.compiled_products`. ``"triton"`` is kernels for CUDA devices, see
        :mod:`kvpress_moe.cache.triton_backend` and, for packed layers,
        :mod:`kvpress_moe.cache.packed_triton_backend`. In float32 and float16 the kernels pass their tests in Triton's
        interpreter. In these types and in bfloat16 they compile for compute capabilities 8.0 to 9.0. But they have not
        run on a GPU, so they are not the default. A callable is a function of your own, with the signature of
        :func:`kvpress_moe.cache.torch_backend.torch_attention`. There is no fallback: if the chosen function cannot
        serve an input, it raises an error at the first token that meets a ragged layer.

    Returns
    -------
    callable
        The function that was in use before. Pass it to this function to return to it.

    Raises
    ------
    SettingError
        If the name is unknown, Triton is not installed, or the C library cannot be built.
    """
    global _in_use
    if attention == "torch":
        attention = torch_attention
    elif attention == "triton":
        try:
            from kvpress_moe.cache.packed_triton_backend import packed_triton_attention
            from kvpress_moe.cache.triton_backend import triton_attention
        except ImportError as error:
            raise SettingError(
                "attention",
                "triton",
                "the package triton, 3.6 or later",
                f"On Linux: pip install 'kvpress-moe[triton]'. Importing it says: {error}",
            ) from error
        PACKED[triton_attention] = packed_triton_attention
        attention = triton_attention
    elif attention == "compiled":
        from kvpress_moe.cache.compiled_products import (
            compiled_attention,
            compiled_packed_attention,
            compiled_packed_attention_together,
            library,
        )

        library()  # built now, not at the first token
        PACKED[compiled_attention] = compiled_packed_attention
        TOGETHER[compiled_attention] = compiled_packed_attention_together
        attention = compiled_attention
    if not callable(attention):
        raise SettingError(
            "attention", attention, "'torch', 'compiled', 'triton' or a function", "Leave it at 'torch'."
        )
    before, _in_use = _in_use, attention
    return before


def register_ragged_attention() -> None:
    """
    Let every registered attention function recognise ragged layers. For other layers nothing changes.

    Calling this again has no effect. Eager attention is not registered with transformers, so it cannot be changed. On a
    ragged layer it fails.
    """
    for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
        if not hasattr(function, "without_ragged"):
            ALL_ATTENTION_FUNCTIONS[name] = recognising_ragged(function)


def recognising_ragged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function, so that keys of a RaggedLayer go to the ragged attention in use."""

    @wraps(function)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        parts = getattr(key, "parts", None)
        if parts is not None:
            return _attend_parts(attention, module, query, parts, **kwargs)
        layer = getattr(key, "ragged_layer", None)
        if layer is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("dropout"):
            raise UnsupportedInputError("dropout: attention over a RaggedCache is for inference; call model.eval().")
        if query.shape[2] > 1 and isinstance(attention_mask, Tensor) and hides_tokens(attention_mask):
            raise UnsupportedInputError(
                "attention_mask: got padding among the tokens that meet a compressed cache, expected questions of "
                "equal length. Ask them one by one, or group those of one length."
            )
        attend = PACKED.get(_in_use, packed_attention) if isinstance(layer, PackedPairs) else _in_use
        scaling, cap = kwargs.get("scaling") or module.scaling, softcap(module)
        if not torch.is_autocast_enabled(query.device.type):
            return attend(query, layer, scaling, cap), None
        # Autocast would change the dtype of some steps only. Pairs that were made outside of it have another dtype.
        with torch.autocast(query.device.type, enabled=False):
            return attend(query.to(layer.new_keys.dtype), layer, scaling, cap).to(query.dtype), None

    attention.without_ragged = function  # type: ignore[attr-defined]
    return attention


def check_implementation(config: Any) -> None:
    """
    Raise if several caches cannot be read together.

    Parameters
    ----------
    config : PretrainedConfig
        Of a model, without vision.

    Raises
    ------
    UnsupportedInputError
        If the model's attention implementation is not ``"sdpa"``.
    """
    name = config._attn_implementation
    if name != "sdpa":
        raise UnsupportedInputError(
            f"attention: got {name!r}, expected 'sdpa' to read several caches together. Call "
            "model.set_attn_implementation('sdpa')."
        )


def _attend_parts(
    attend: Callable[..., Any],
    module: Any,
    query: Tensor,
    parts: Sequence[tuple[int, Tensor, Tensor]],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Attention of the new tokens of several caches, each over its own; see :mod:`kvpress_moe.cache.joined_cache`.

    Parameters
    ----------
    attend : callable
        Attention of one cache.
    module : attention layer
    query : Tensor, shape (1, num_heads, sum of Q_i, D)
    parts : sequence of (Q_i, keys, values)
        Keys and values of each cache with its new tokens.

    Returns
    -------
    Tensor, shape (1, sum of Q_i, num_heads, D)
    """
    check_implementation(module.config)
    own = {name: value for name, value in kwargs.items() if name != "position_ids"}  # those of all caches
    queries = query.split([n_new for n_new, _, _ in parts], dim=2)
    outputs: list[Tensor | None] = [None] * len(parts)
    layers = {n: layer for n, (n_new, key, _) in enumerate(parts) if n_new == 1 and (layer := _packed_layer(key))}
    together = None if torch.is_autocast_enabled(query.device.type) else TOGETHER.get(_in_use)
    if together is not None and layers and can_attend_together(list(layers.values())):
        scaling, cap = kwargs.get("scaling") or module.scaling, softcap(module)
        for group in of_similar_length(layers, query.shape[1]):
            rows = torch.cat([queries[n] for n in group])
            found = together(rows, [layers[n] for n in group], scaling, cap)
            for n, output in zip(group, found.split(1), strict=True):
                outputs[n] = output
    for n, (n_new, key, value) in enumerate(parts):
        if outputs[n] is None:
            is_dense = not hasattr(key, "ragged_layer")
            mask = _causal(n_new, key, kwargs.get("sliding_window")) if is_dense else None
            outputs[n] = attend(module, queries[n], key, value, mask, **own)[0]
    return torch.cat([output for output in outputs if output is not None], dim=1), None


def _packed_layer(key: Any) -> PackedPairs | None:
    layer = getattr(key, "ragged_layer", None)
    return layer if isinstance(layer, PackedPairs) else None


def _causal(n_new: int, key: Tensor, window: int | None) -> Tensor | None:
    """Mask (1, 1, Q, S) of the newest tokens over a dense layer, True where attention is allowed. None if all is."""
    n_keys = key.shape[2]
    if n_new == 1 and (window is None or n_keys <= window):
        return None
    everything = torch.ones(n_new, n_keys, dtype=torch.bool, device=key.device)
    seen = everything.tril(n_keys - n_new)
    return (seen if window is None else seen.triu(n_keys - n_new - window + 1))[None, None]
