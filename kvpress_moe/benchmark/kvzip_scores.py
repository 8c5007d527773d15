"""KVzip's scores without its selection, for benchmark and training."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import KVzipPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.model.attention_view import AttentionView
from kvpress_moe.model.chat_template import cut_message
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import Attention, language_model
from kvpress_moe.model.transformers_api import own_names


class ReplayScores(KVzipPress):  # type: ignore[misc]
    """
    KVzip's scores (arXiv 2505.23416) without its selection.

    A score is the largest attention that a repetition of the context pays to a pair.

    Parameters
    ----------
    kvzip_plus_normalization : bool
        Multiply by the norm of what the value writes, divided by the norm of the hidden state (KVzip+).
    """

    def __init__(self, kvzip_plus_normalization: bool = False):
        logging.getLogger(KVzipPress.__module__).disabled = True  # warns at each start that KVzip is slow
        super().__init__(compression_ratio=0.5, kvzip_plus_normalization=kvzip_plus_normalization)

    def compress_post(self, model: PreTrainedModel) -> None:
        self.scores = self.score_val.clone()

    def _compute_cross_attention(
        self, module: Attention, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """KVzip's attention, with the layer's own norms and its own scaling of the logits."""
        own_scaling = module.scaling * math.sqrt(module.head_dim)
        keys = keys if math.isclose(own_scaling, 1.0) else keys * own_scaling
        view = AttentionView(module, hidden_states)
        attention: Tensor = super()._compute_cross_attention(view, hidden_states, keys, kwargs)
        return attention

    @torch.no_grad()
    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Tensor,
        cache: DynamicCache,
        n_prefix: int = 0,
    ) -> Tensor:
        """
        Scores (L, H, S), float32, of a prompt that is already prefilled. Afterwards the cache is as before.

        The scores of sliding-window layers have no meaning.

        Parameters
        ----------
        model : PreTrainedModel
        tokenizer : PreTrainedTokenizerBase
        input_ids : Tensor, shape (1, S)
        cache : DynamicCache
            Full cache of these tokens. In it, sliding-window layers must keep all pairs too.
        n_prefix : int
            Number of first tokens that belong to the chat template. They are not repeated; their scores are 0.
        """
        teach_kvpress()
        self._context_ids, self._cache, self.prefix_length = input_ids, cache, n_prefix
        suffix = chat_suffix(tokenizer)
        self._suffix_ids = tokenizer.encode(suffix, return_tensors="pt", add_special_tokens=False)
        try:
            # This is the part of KVzipPress.__call__ after the prefill; the rest would load a tokenizer by name.
            # Of multimodal models it gets the text part.
            config = model.config.get_text_config(decoder=True)
            text = SimpleNamespace(config=config, dtype=model.dtype, device=model.device, model=language_model(model))
            with own_names(text.model):  # kvpress names the cache as older releases of transformers do
                self._perform_kvzip_compression(text, tokenizer)
        finally:
            self._reset_internal_parameters()
        scores: Tensor = self.scores[:, 0].float()
        return scores


def chat_suffix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template puts between the user's words and the answer; a new line if there is no template."""
    if not tokenizer.chat_template:
        return "\n"
    return cut_message(tokenizer, "dummy context")[1]
