"""
What differs between the releases of transformers that are supported: names of arguments and outputs, lengths of crops.

Up to 5.2, attention layers and models take their cache as ``past_key_values`` and the indices of the new tokens as
``cache_position``. Later releases call the cache ``cache`` and have no ``cache_position``. Everything that depends on
this is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention

#: Name of the argument that takes the cache, and of the output that returns it.
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"

#: Whether kvpress 0.5.5 reads the arguments of attention layers under the names that they have.
KVPRESS_KNOWS = CACHE == "past_key_values"

#: Whether ``crop`` takes the number of tokens to remove, as a negative number; else it takes the length that is left.
CROPS_REMOVE = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


def with_cache(cache: Cache | None, positions: Tensor | None = None) -> dict[str, Any]:
    """
    Arguments of a model's forward pass: its cache and, where the release has that argument, ``cache_position``.

    Parameters
    ----------
    cache : Cache or None
    positions : Tensor, shape (Q,), optional
        Indices of the new tokens in the text.
    """
    arguments: dict[str, Any] = {CACHE: cache}
    if positions is not None and KVPRESS_KNOWS:
        arguments["cache_position"] = positions
    return arguments


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, by either name; None if there is none."""
    cache = arguments.get(CACHE)
    return arguments.get("past_key_values") if cache is None else cache


def returned_cache(output: Any) -> Any:
    """The cache in a model's output, which is a tuple with ``return_dict=False``; None if there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, CACHE, None)


def attention_arguments(module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of an attention layer's forward pass by the names that kvpress reads.

    For forward hooks, which run after the layer has put its new pairs into the cache.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    arguments : mapping
        As the hook got them.
    """
    named = dict(arguments)
    cache = named["past_key_values"] = given_cache(named)
    if named.get("cache_position") is None and cache is not None:
        hidden_states = named["hidden_states"]
        n_new = hidden_states.shape[1]
        start = max(0, cache.get_seq_length(module.layer_idx) - n_new)  # another press may have evicted from a prompt
        named["cache_position"] = torch.arange(start, start + n_new, device=hidden_states.device)
    return named


def crop(cache: Any, length: int) -> None:
    """Take tokens off the end of a cache, or of a cache's layer, until at most ``length`` tokens are left."""
    cache.crop(min(0, length - cache.get_seq_length()) if CROPS_REMOVE else length)


@contextmanager
def own_names(*modules: nn.Module) -> Iterator[None]:
    """
    Let callers name a model's cache ``past_key_values`` inside the block, without a warning.

    kvpress's own code uses that name, and newer releases of transformers warn of it.
    """

    def rename(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "past_key_values" not in kwargs or CACHE in kwargs:
            return None
        kwargs = dict(kwargs)
        kwargs[CACHE] = kwargs.pop("past_key_values")
        return args, kwargs

    if KVPRESS_KNOWS:
        yield
        return
    handles = [module.register_forward_pre_hook(rename, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
