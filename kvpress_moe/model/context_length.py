"""Whether a text fits into a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpress_moe.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_length(model: PreTrainedModel, n_context: int, n_question: int = 0, n_answer: int = 0) -> None:
    """Raise if text, question and answer together are longer than the model allows."""
    limit = model.config.get_text_config().max_position_embeddings
    if n_context + n_question + n_answer > limit:
        raise SettingError(
            "TEXT",
            f"{n_context} tokens",
            f"at most {limit - n_question - n_answer}, so that question and answer fit into the model's {limit}",
            "Shorten the text, or name another --model.",
        )
