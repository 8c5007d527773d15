"""Hooks and attributes that a model has only inside a block. They are removed at the end, whatever happens."""

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
    Attention layers that have no rotary embedding of their own before the block have none after it.

    kvpress puts ``rotary_emb`` on every attention layer and leaves it there. Yields the layers without a rotary
    embedding of their own.
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
    Do what kvpress does before it adds hooks: presses see the model, and attention layers get a rotary embedding.

    Gemma 3 has one embedding for two types of layers. It has to be told the type, and kvpress's presses do not do this.
    """
    for press in presses:
        press.post_init_from_model(model)
    with bare_afterwards(model) as bare:
        for attention in bare:
            attention.rotary_emb = of_layer(language_model(model).rotary_emb, attention)
        yield
