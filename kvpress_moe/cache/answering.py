"""Answers to questions about a text that is already in a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress.pipeline import KVPressTextGenerationPipeline
from torch import Tensor
from transformers import DynamicCache

from kvpress_moe.model.kvpress_host import teach_kvpress


@torch.no_grad()
def answer_each(
    pipeline: KVPressTextGenerationPipeline,
    cache: DynamicCache,
    questions_ids: Sequence[Tensor],
    n_context: int,
    max_new_tokens: int,
    on_answer: Callable[[], Any] = lambda: None,
) -> list[str]:
    """
    Answer each question alone, by greedy decoding. Afterwards the cache is as before.

    Parameters
    ----------
    pipeline : KVPressTextGenerationPipeline
        Pipeline of the model that filled the cache.
    cache : DynamicCache
        The cache of the text, compressed or not.
    questions_ids : sequence of Tensor, shape (1, Q)
        Token ids as the pipeline's ``preprocess`` returns them.
    n_context : int
        Number of tokens of the text before it was compressed.
    max_new_tokens : int
    on_answer : callable, optional
        Called without arguments after each answer, for a progress bar.
    """
    teach_kvpress()
    lengths = [cache.get_seq_length(layer_idx) for layer_idx in range(len(cache))]
    answers = []
    for question_ids in questions_ids:
        answers.append(pipeline.generate_answer(question_ids, cache, n_context, max_new_tokens))
        pipeline._remove_answer_from_cache(cache, lengths)
        on_answer()
    return answers
