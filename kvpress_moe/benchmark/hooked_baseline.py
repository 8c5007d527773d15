"""Baseline for the shared prefill: the same figures in the usual way, with one prefill per press and ratio."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import kvpress
import torch
from transformers import DynamicCache

from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.multi_pass import attention_of
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.protected_tokens import protect
from kvpress_moe.benchmark.shared_prefill import fixed_seed, set_ratio
from kvpress_moe.cache import RaggedCache, RaggedLayer
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.model.hooks import bare_afterwards
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import full_attention_layers, full_attentions, language_model, of_layer, slides
from kvpress_moe.model.transformers_api import with_cache

if TYPE_CHECKING:
    from kvpress_moe.benchmark.evaluator import Evaluator

#: Presses that need one pass and keep equal lengths. Both ways can run them.
COMPARED = (
    "random",
    "knorm",
    "keydiff",
    "streaming_llm",
    "snapkv",
    "tova",
    "lagkv",
    "cur",
    "leverage",
    "expected_attention",
)


@torch.no_grad()
def answer_hooked(
    model: Any, prompt: Prompt, method: Method, ratio: float, sinks: int, recent: int
) -> tuple[torch.Tensor, DynamicCache]:
    """
    Prefill with the hooked press, then run question and answer. Returns logits (A, V) of the answer, and the cache.

    As in the shared prefill, random numbers are seeded layer by layer, and sliding-window layers are not compressed.
    """
    press: Any = method.make(lambda scorer: protect(scorer, sinks, recent))
    set_ratio(press, ratio)
    compress = press.compress

    def compress_seeded(module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
        if slides(module.config, module.layer_idx):
            return keys, values
        with fixed_seed(module.layer_idx):
            return compress(module, hidden_states, keys, values, *rest)

    object.__setattr__(press, "compress", compress_seeded)
    teach_kvpress()
    cache = DynamicCache()
    with bare_afterwards(model), attention_of(model, method.eager), press(model):
        for attention in full_attentions(model):
            attention.rotary_emb = of_layer(attention.rotary_emb, attention)
        model.model(input_ids=prompt.context.to(model.device), **with_cache(cache))
    n_read = prompt.context.shape[1]
    attentions = [layer.self_attn for layer in language_model(model).layers]
    lengths = {cache.get_seq_length(layer_idx) for layer_idx in full_attention_layers(model)}
    if len(lengths) > 1 or any(getattr(attention, "masked_key_indices", None) is not None for attention in attentions):
        # kvpress's own masking fails here: it needs equal lengths, and does not always find keys that no query sees.
        cache = RaggedCache.from_masked(model, cache)
        for layer in cache.layers:
            if isinstance(layer, RaggedLayer):
                layer.n_read = n_read
    fit_masks(cache, model.config.get_text_config(decoder=True))  # of sliding-window layers: lengths differ now
    tokens = torch.cat((prompt.question, prompt.answer[:, :-1]), dim=1).to(model.device)
    start = cache.get_seq_length() if isinstance(press, kvpress.KeyRerotationPress) else n_read
    positions = torch.arange(start, start + tokens.shape[1], device=model.device)
    logits = model(
        input_ids=tokens,
        **with_cache(cache, positions),
        position_ids=positions[None],
        logits_to_keep=prompt.answer.shape[1],
    ).logits[0]
    return logits, cache


def compare(evaluator: Evaluator, n_samples: int, ratios: tuple[float, ...]) -> dict[str, Any]:
    """
    Evaluate the same samples × methods × ratios in both ways, one after the other; compare times and results.

    Returns
    -------
    dict
        Seconds of both, their ratio, and the largest difference between their NLLs.
    """
    methods = [name for name in evaluator.methods if name in COMPARED]
    cells = [(name, ratio) for name in methods for ratio in ratios]
    plan = evaluator.plan
    seconds = {"shared": 0.0, "naive": 0.0}
    difference = 0.0
    for sample in evaluator.samples[:n_samples]:
        start = time.perf_counter()
        record = evaluator.evaluate(sample, cells, decode=False)  # the other way does not decode either
        seconds["shared"] += time.perf_counter() - start
        start = time.perf_counter()
        prompt = evaluator.prompt(sample)
        for row, (name, ratio) in zip(record["results"], cells, strict=True):
            logits, _ = answer_hooked(evaluator.model, prompt, evaluator.methods[name], ratio, plan.sinks, plan.recent)
            nll = torch.nn.functional.cross_entropy(logits.float(), prompt.answer[0].to(logits.device))
            difference = max(difference, abs(nll.item() - row[3]))
        seconds["naive"] += time.perf_counter() - start
    return {
        "samples": n_samples,
        "methods": len(methods),
        "ratios": len(ratios),
        "seconds_shared": round(seconds["shared"], 1),
        "seconds_naive": round(seconds["naive"], 1),
        "times_faster": round(seconds["naive"] / seconds["shared"], 2),
        "largest_nll_difference": float(f"{difference:.3g}"),
    }
