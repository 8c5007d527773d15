"""Token ids -> the piece of text that each token adds, and what two answers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoding shows for half a character


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds. Joined, the pieces are the decoded text.

    If several tokens form one character, it belongs to the last of them, and the others add nothing. Each token is
    decoded together with the one before it, because some tokenizers drop the space before the first word of a text.
    """
    ids, texts = list(ids), []
    context, start = 0, 0  # first token that is decoded again, and first token without a piece yet

    def decode(first: int, last: int) -> str:
        return cast(str, tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False))

    for end in range(1, len(ids) + 1):
        before, now = decode(context, start), decode(context, end)
        if now.endswith(INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        context, start = start, end
    return texts


def mark_matches(ours: Sequence[str], other: Sequence[str]) -> tuple[list[list[Any]], list[list[Any]]]:
    """The pieces of each answer as [text, 1 if the other answer has it too, else 0]; aligned by longest matches."""
    marked: list[list[list[Any]]] = [[[piece, 0] for piece in answer] for answer in (ours, other)]
    for block in SequenceMatcher(a=ours, b=other, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            marked[0][block.a + offset][1] = marked[1][block.b + offset][1] = 1
    return marked[0], marked[1]
