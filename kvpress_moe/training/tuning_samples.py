"""Tuning samples: a prompt, what the routers see of it, and what the model is asked about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvpress_moe.benchmark.kvzip_scores import chat_suffix
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.shards import Shards

REPEATED = 96  # tokens that the model repeats


@dataclass(frozen=True)
class TuningSample:
    """
    One prompt for the end-to-end tuning.

    Attributes
    ----------
    prompt : Prompt
    shard : Path
        File with what was captured of the prompt.
    """

    prompt: Prompt
    shard: Path

    @property
    def cache_path(self) -> Path:
        """File of the prompt cache, in the directory ``caches`` beside the shards."""
        return self.shard.parent / "caches" / self.shard.name


@dataclass(frozen=True)
class CapturedPrompt:
    """
    What routers see of one prompt, L captured layers.

    Attributes
    ----------
    hidden : Tensor, shape (L, S, C), float32
    ranks : Tensor, shape (L, S, H, E), float32
        One column for each expert of the config. The column of the learned expert is ignored.
    power : Tensor, shape (L, H), float32
        Mean squared norm of the latest queries.
    """

    hidden: Tensor
    ranks: Tensor
    power: Tensor


def reader(config: TrainingConfig, captured: Sequence[str]) -> Callable[[Path], CapturedPrompt]:
    """A function that reads what the routers of a config see of a prompt, from shards with these experts."""
    columns = [captured.index(name) if name != "learned" else 0 for name in config.experts]

    def read(path: Path) -> CapturedPrompt:
        shard = Shards(path.parent).seen(path)
        ranks = shard["ranks"][:, columns].permute(0, 3, 2, 1).float().clamp(max=1 - 1e-4)  # (L, S, H, E)
        return CapturedPrompt(shard["hidden"].float(), ranks, shard["power"].float().exp())

    return read


def question(prompt: Prompt) -> tuple[Tensor, int]:
    """The prompt's question and right answer (1, T), and how many of these tokens predict the answer."""
    return torch.cat((prompt.question, prompt.answer[:, :-1]), dim=1), prompt.answer.shape[1]


def repetition(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> tuple[Tensor, int]:
    """KVzip's question for a random part of the context and that part (1, T), and how many tokens predict the part."""
    ids = prompt.context[0].tolist()
    start = rng.randint(min(prompt.n_prefix + 8, len(ids) - 1), max(len(ids) - REPEATED, prompt.n_prefix + 8))
    start = min(start, len(ids) - 1)
    before = tokenizer.decode(ids[max(prompt.n_prefix, start - 8) : start], skip_special_tokens=True)
    words = f"\n\nRepeat the part of the previous context exactly, starting with `{before}`:"
    asked = tokenizer.encode(words + chat_suffix(tokenizer), add_special_tokens=False)
    part = ids[start : start + REPEATED]
    return torch.tensor([[*asked, *part[:-1]]]), len(part)
