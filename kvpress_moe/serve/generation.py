"""Generation: how tokens are drawn, and the text that they make."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

COLDEST = 1e-4  # below this temperature the likeliest token is taken; dividing by less may overflow


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is drawn.

    Attributes
    ----------
    max_tokens : int
    temperature : float
        0: the likeliest token.
    top_p : float
    seed : int or None
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


def borrowed(cache: DynamicCache) -> DynamicCache:
    """
    A cache that shares all pairs of another one, and can grow without changing it.

    Layers replace their tensors when tokens come, so it is enough to copy the layer objects.
    """
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def generator_of(sampling: Sampling) -> torch.Generator:
    """The source of chance of an answer."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits (V,)."""
    if sampling.temperature < COLDEST or sampling.top_p == 0:
        return int(logits.argmax())
    scores: Any = logits[None]
    unused: Any = torch.empty(1, 0, dtype=torch.long)
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(unused, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(unused, scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class TextOfTokens:
    """
    The text of tokens that come one by one, cut at stop texts.

    Only text that later tokens cannot change is given out: no half of a character, and nothing that may be the
    beginning of a stop text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    stop : sequence of str
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._given = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The new text, which may be empty."""
        self._tokens.append(token)
        text = self._text()
        cut = min((at for at in map(text.find, self._stop) if at >= 0), default=None)
        if cut is not None:
            self.is_stopped = True
            return self._give(text, cut)
        if text.endswith("\ufffd"):
            return ""
        return self._give(text, len(text) - self._may_begin_a_stop(text))

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        text = self._text()
        return "" if self.is_stopped else self._give(text, len(text))

    def _text(self) -> str:
        text: Any = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return str(text)

    def _give(self, text: str, end: int) -> str:
        new = text[self._given : max(self._given, end)]
        self._given = max(self._given, end)
        return new

    def _may_begin_a_stop(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        lengths = [n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        return max(lengths, default=0)
