"""Token ids -> the piece of text that each token adds, and what two answers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoding shows for half a character


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds; joined they are the decoded text.

    A character that several tokens spell belongs to the last of them, the others add nothing. Each token is decoded
    behind the one before it, since some tokenizers drop the space before a text's first word.
    """
    ids, texts = list(ids), []
    context, start = 0, 0  # what is decoded along, and the first token whose text is not out yet

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
    """Each answer's pieces as [text, whether the other answer has it at the same place]; the longest matches align."""
    marked: list[list[list[Any]]] = [[[piece, 0] for piece in answer] for answer in (ours, other)]
    for block in SequenceMatcher(a=ours, b=other, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            marked[0][block.a + offset][1] = marked[1][block.b + offset][1] = 1
    return marked[0], marked[1]
