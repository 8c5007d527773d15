"""Explore a text: prefill it once, and compress a copy of its cache for every setting of the press."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from kvpress.pipeline import KVPressTextGenerationPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.budget.allocation import MIN_PAIRS
from kvpress_moe.cache.answering import answer_each
from kvpress_moe.cache.prefill import Prefill, cache_bytes
from kvpress_moe.errors import SettingError, UnsupportedInputError
from kvpress_moe.explore.payload import payload
from kvpress_moe.explore.recording_press import RecordingPress
from kvpress_moe.explore.tokens import mark_matches, pieces
from kvpress_moe.model.context_length import check_length
from kvpress_moe.routers import Routers

Step = Callable[..., Any]


@dataclass
class PrefilledText:
    """
    A prefilled text, with the answers from its full cache.

    Attributes
    ----------
    pipeline : KVPressTextGenerationPipeline
    prefill : Prefill
    input_ids : Tensor, shape (1, S)
    questions : sequence of str
    questions_ids : sequence of Tensor, shape (1, Q)
    answers : list of str
        Answers from the full cache.
    max_new_tokens : int
    seconds : float
        Duration of the prefill.
    """

    pipeline: KVPressTextGenerationPipeline
    prefill: Prefill
    input_ids: Tensor
    questions: Sequence[str]
    questions_ids: Sequence[Tensor]
    answers: list[str]
    max_new_tokens: int
    seconds: float


def make_press(settings: Mapping[str, Any]) -> RecordingPress:
    """
    Make the press to explore.

    Raises
    ------
    SettingError
        If a setting is wrong, or if the ratio is 0: then no pair is scored.
    """
    press = RecordingPress(**settings)
    if press.max_kl is None and not press.compression_ratio:
        raise SettingError(
            "ratio",
            press.compression_ratio,
            "a number in (0, 1), the share of pairs (with a precision: of bytes) to remove",
            "At 0 no pair is scored. The slider of the page goes down to 0.",
        )
    return press


def prefill_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    questions: Sequence[str],
    max_new_tokens: int,
    step: Step,
) -> PrefilledText:
    """
    Prefill a text, and answer the questions from its full cache.

    Parameters
    ----------
    step : callable
        ``step(description, total=None, advance=0)`` reports progress.

    Raises
    ------
    SettingError
        If text, question and answer together are longer than the model allows.
    """
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    tokens = pipeline.preprocess(context, list(questions), "", sys.maxsize)
    input_ids, questions_ids = tokens["context_ids"], tokens["questions_ids"]
    check_length(model, input_ids.shape[1], max((ids.shape[1] for ids in questions_ids), default=0), max_new_tokens)
    step("prefill", total=model.config.get_text_config().num_hidden_layers)
    started = time.perf_counter()
    prefill = Prefill(model, input_ids, on_layer=partial(step, "prefill", advance=1))
    seconds = time.perf_counter() - started
    step("asking the full cache", total=max(1, len(questions)))
    answers = answer_each(
        pipeline,
        prefill.compress(None),
        questions_ids,
        input_ids.shape[1],
        max_new_tokens,
        on_answer=partial(step, "asking the full cache", advance=1),
    )
    return PrefilledText(pipeline, prefill, input_ids, questions, questions_ids, answers, max_new_tokens, seconds)


def explore(prefilled: PrefilledText, press: RecordingPress, step: Step) -> dict[str, Any]:
    """
    Compress a copy of the cache, answer the questions from it, and collect the data of the page.

    Parameters
    ----------
    prefilled : PrefilledText
    press : RecordingPress
        See :func:`make_press`.
    step : callable
        As in :func:`prefill_text`.

    Returns
    -------
    dict
        See :func:`kvpress_moe.explore.payload.payload`.

    Raises
    ------
    UnsupportedInputError
        If the press compressed no layer.
    """
    pipeline, prefill = prefilled.pipeline, prefilled.prefill
    step("compressing", total=1)
    cache = prefill.compress(press)
    if not press.records:
        raise UnsupportedInputError("TEXT: no layer of this model was compressed, expected at least one.")
    step("asking the compressed cache", total=max(1, len(prefilled.questions)))
    answers = answer_each(
        pipeline,
        cache,
        prefilled.questions_ids,
        prefilled.input_ids.shape[1],
        prefilled.max_new_tokens,
        on_answer=partial(step, "asking the compressed cache", advance=1),
    )
    step("writing the page", total=1)

    def tokens_of(answer: str) -> list[str]:
        return pieces(pipeline.tokenizer, pipeline.tokenizer.encode(answer, add_special_tokens=False))

    marked = []
    for question, full, compressed in zip(prefilled.questions, prefilled.answers, answers, strict=True):
        in_full, in_compressed = mark_matches(tokens_of(full), tokens_of(compressed))
        marked.append({"question": question, "full": in_full, "compressed": in_compressed})
    promises = press.get_stats().get("promises", [])
    ratio = 1 - promises[-1]["share"] if promises else press.compression_ratio
    layers = len(press.records)
    trained = cast(Routers, press.routers).config.trained
    return payload(
        tokens=pieces(pipeline.tokenizer, prefilled.input_ids[0].tolist()),
        records=dict(sorted(press.records.items())),
        experts=list(press.expert_strategies.values()),
        budget={
            "ratio": ratio,
            "scope": press.scope,
            "min_share": press.min_share,
            "min_pairs": MIN_PAIRS,
        },
        bound_to_ratio=press.bound_to_ratio(),
        about={
            "model": pipeline.model.config.name_or_path.rstrip("/").split("/")[-1],
            "layers": f"{layers} of {len(prefill.cache.layers)} compressed",
            "experts": f"top {press.top_k} of {press.num_experts} judge each token",
            "routers": "trained" if trained else "untrained",
            "prefill": f"{prefilled.seconds:.1f} s",
            "full_mib": round(cache_bytes(prefill.cache) / 2**20, 2),
            "compressed_mib": round(cache_bytes(cache) / 2**20, 2),
        },
        answers=marked,
        promise=promises[-1] if promises else None,
    )
