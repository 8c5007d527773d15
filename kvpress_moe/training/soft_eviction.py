"""Soft eviction: a mask that evicts cached pairs in part, for end-to-end tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress_moe.errors import UnsupportedModelError
from kvpress_moe.model.hooks import hooked
from kvpress_moe.model.layers import Attention, attn_implementation, language_model


def check_takes_masks(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if a model's attention takes no additive masks."""
    attention = attn_implementation(model)
    if attention not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"model: got attn_implementation={attention!r}, expected 'sdpa' or 'eager', which add masks to the logits "
            "of attention: tuning end to end needs that. Load it with 'sdpa', or train with end_to_end=0."
        )


@contextmanager
def softly_evicted(model: PreTrainedModel, layers: Sequence[int], log_kept: Tensor) -> Iterator[None]:
    """
    Inside the block, ``log_kept`` (L, H, S) is added to the attention logits of the S cached tokens in these layers.

    It is part of the layers' attention mask. Every attention implementation with additive masks adds it.
    """

    def weigh(number: int, module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        n_new = hidden.shape[1]
        groups = module.config.num_attention_heads // log_kept.shape[1]
        cached = log_kept[number].to(hidden).repeat_interleave(groups, 0)[:, None].expand(-1, n_new, -1)
        later = torch.ones(n_new, n_new, dtype=torch.bool, device=hidden.device).triu(1)
        own = torch.zeros_like(later, dtype=hidden.dtype).masked_fill(later, torch.finfo(hidden.dtype).min)
        mask = torch.cat((cached, own.expand(len(cached), -1, -1)), dim=-1)[None]
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as hooks:
        for number, layer_idx in enumerate(layers):
            attention = language_model(model).layers[layer_idx].self_attn
            hooks.enter_context(hooked([attention], partial(weigh, number), before=True))
        yield
