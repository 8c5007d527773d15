"""Hooks and attributes that are on a model inside a block alone, whatever happens there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvpress.presses.base_press import BasePress
from torch import nn
from transformers import PreTrainedModel

from kvpress_moe.model.layers import Attention, language_model, of_layer


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    """
    Call a hook at every forward pass of some modules, inside the block.

    Parameters
    ----------
    modules : iterable of nn.Module
    hook : callable
        ``(module, args, kwargs, output)`` as torch calls forward hooks; with ``before``, ``(module, args, kwargs)``.
    before : bool, default=False
        Before the pass instead of after it.
    """
    with ExitStack() as hooks:
        for module in modules:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            hooks.callback(register(hook, with_kwargs=True).remove)
        yield


@contextmanager
def bare_afterwards(model: PreTrainedModel) -> Iterator[list[Attention]]:
    """
    Attention layers without a rotary embedding of their own have none after the block.

    kvpress puts ``rotary_emb`` on every attention layer and leaves it there. Yields the layers that have none yet.
    """
    attentions = [layer.self_attn for layer in language_model(model).layers]
    bare = [attention for attention in attentions if not hasattr(attention, "rotary_emb")]
    try:
        yield bare
    finally:
        for attention in bare:
            attention._modules.pop("rotary_emb", None)


@contextmanager
def prepared(model: PreTrainedModel, presses: Iterable[BasePress]) -> Iterator[None]:
    """
    What kvpress does before its hooks: presses see the model, attention layers their rotary embedding.

    Gemma 3 has one embedding for two types of layers and has to be told which; kvpress's presses do not tell it.
    """
    for press in presses:
        press.post_init_from_model(model)
    with bare_afterwards(model) as bare:
        for attention in bare:
            attention.rotary_emb = of_layer(language_model(model).rotary_emb, attention)
        yield
