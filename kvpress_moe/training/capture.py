"""Capture: run one prompt through the frozen model and record what the routers learn from (a shard)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.cache_eval import evaluate_full_cache
from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import rank_within_head
from kvpress_moe.model.hooks import hooked, prepared
from kvpress_moe.model.layers import Attention, full_attention_layers, language_model
from kvpress_moe.model.transformers_api import attention_arguments, with_cache
from kvpress_moe.press.packing import query_power

_LEAST = 1e-6  # of a norm: a padding token's embedding may be zero


@torch.no_grad()
def capture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, experts: Sequence[Expert]
) -> dict[str, Tensor]:
    """
    Record what the routers learn from one prompt, for the L layers with full attention.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        Encodes the request for a repetition.
    prompt : Prompt
        The routers learn to score the pairs of its context. Its question and answer show which pairs a real question
        attends to.
    experts : sequence of Expert
        The experts whose scores are recorded.

    Returns
    -------
    dict
        What :func:`observe` returns, and in float16 too:

        - ``replay`` (L, H, S): log of the largest attention that a repetition of the context pays (KVzip,
          arXiv 2505.23416); minus infinity in the template's prefix (or ``<bos>``), which is not repeated;
        - ``answer`` (L, H, S): the same for the real question and answer.
    """
    cache = DynamicCache()
    seen = observe(model, prompt, experts, cache)
    replay = ReplayScores().of(model, tokenizer, prompt.context.to(model.device), cache, prompt.n_prefix)
    replay = replay[full_attention_layers(model)]
    peak = evaluate_full_cache(model, cache, prompt).peak
    return {**seen, "replay": replay.log().half().cpu(), "answer": peak.log().half().cpu()}


@torch.no_grad()
def observe(
    model: PreTrainedModel, prompt: Prompt, experts: Sequence[Expert], cache: DynamicCache | None = None
) -> dict[str, Tensor]:
    """
    Record what can be seen of a prompt's pairs in its prefill, for the L layers with full attention.

    Parameters
    ----------
    model : PreTrainedModel
    prompt : Prompt
    experts : sequence of Expert
    cache : DynamicCache, optional
        Empty; the prefill fills it.

    Returns
    -------
    dict
        All in float16:

        - ``hidden`` (L, S, C): inputs of the attention layers;
        - ``ranks`` (L, E, H, S): each expert's ranks within the head;
        - ``writes`` (L, H, S): log of ‖W_O v‖, what the value adds to the residual stream (the largest over the head's
          query heads), minus the log of the stream's norm in this layer (mean over all tokens);
        - ``power`` (L, H): log of the mean squared norm of the latest queries.
    """
    hidden, ranks, writes, power, stream = [], [], [], [], []
    cache = DynamicCache() if cache is None else cache

    def record_stream(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual = args[0] if args else kwargs["hidden_states"]
        stream.append(residual.float().norm(dim=-1).clamp(min=_LEAST).log().mean())

    def record(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        layer = cache.layers[module.layer_idx]
        kwargs = attention_arguments(module, kwargs)
        call = LayerCall(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        hidden.append(call.hidden_states[0].half())
        ranks.append(torch.stack([rank_within_head(expert.score(call, 0.5))[0].half() for expert in experts]))
        power.append(query_power(call).log().half())
        written = written_norm(module, layer.values)[0].float().clamp(min=_LEAST)
        writes.append((written.log() - stream[-1]).half())

    presses = [expert.scorer for expert in experts if hasattr(expert.scorer, "post_init_from_model")]
    blocks = [language_model(model).layers[layer_idx] for layer_idx in full_attention_layers(model)]
    attentions = [block.self_attn for block in blocks]
    with prepared(model, presses), hooked(blocks, record_stream, before=True), hooked(attentions, record):
        model.model(input_ids=prompt.context.to(model.device), **with_cache(cache))
    recorded = {"hidden": hidden, "ranks": ranks, "writes": writes, "power": power}
    return {name: torch.stack(tensors).cpu() for name, tensors in recorded.items()}


def written_norm(module: Attention, values: Tensor) -> Tensor:
    """‖W_O v‖ (B, H, S): how much values (B, H, S, D) write into the residual stream; largest over the query heads."""
    head_dim, n_heads = values.shape[-1], values.shape[1]
    by_head = module.o_proj.weight.unflatten(1, (n_heads, -1, head_dim))  # (C, H, G, D)
    norms = [
        torch.einsum("bsd,cgd->bgsc", values[:, head], by_head[:, head]).norm(dim=-1).amax(1) for head in range(n_heads)
    ]
    return torch.stack(norms, 1)
