"""KVzip's scores, for those who need the scores and not the selection: benchmark and training."""

from __future__ import annotations

import logging

import torch
from kvpress import KVzipPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.model_support import language_model


class ReplayScores(KVzipPress):
    """
    KVzip's scores (arXiv 2505.23416) without its selection: the largest attention that a repetition of the context
    pays to each pair.

    Parameters
    ----------
    kvzip_plus_normalization : bool
        Times the norm of what the value writes over the norm of the hidden state (KVzip+).
    """

    def __init__(self, kvzip_plus_normalization: bool = False):
        logging.getLogger(KVzipPress.__module__).disabled = True  # says at each start that KVzip is slow
        super().__init__(compression_ratio=0.5, kvzip_plus_normalization=kvzip_plus_normalization)

    def compress_post(self, model: PreTrainedModel) -> None:
        self.scores = self.score_val.clone()

    @torch.no_grad()
    def of(self, model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """
        Scores (L, H, S), float32, of a prompt (1, S) whose full cache is there; the cache is as before afterwards.
        """
        with self(model):
            self._context_ids, self._cache = input_ids, cache
        for layer in language_model(model).layers:
            layer.self_attn._modules.pop("rotary_emb", None)
        return self.scores[:, 0].float()
