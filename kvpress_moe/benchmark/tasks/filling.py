"""Contexts of a wanted length: filler, with facts hidden at wanted depths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

from kvpress_moe.errors import SettingError

CountTokens = Callable[[str], int]


def check_room(field: str, length: int, needed: int) -> None:
    """Raise if a context of this length cannot hold what it has to."""
    if length < needed:
        raise SettingError("lengths", length, f"at least {needed} tokens for {field}", "Ask for a longer context.")


def cycle_sentences(random: Random, sentences: Sequence[str]) -> Iterator[str]:
    """Sentences in their own order from a random start, round and round."""
    start = random.randrange(len(sentences))
    return (sentences[(start + step) % len(sentences)] for step in count())


def fill(filler: Iterator[str], room: int, count_tokens: CountTokens, joint: str = " ") -> list[str]:
    """
    Pieces of filler that together take at most ``room`` tokens, and nearly so many.

    Raises
    ------
    SettingError
        If the filler ends long before the room does.
    """
    pieces: list[str] = []
    used = 0
    for piece in filler:
        used += count_tokens(joint + piece)
        if used > room:
            break
        pieces.append(piece)
    else:
        if used < 0.8 * room:
            most = f"at most about {used} tokens: the split has no more names"
            raise SettingError("lengths", room, most, "Ask for a shorter context, or leave this task out.")
    return pieces


def hide(pieces: Sequence[str], facts: Sequence[tuple[float, str]]) -> list[str]:
    """Put each fact between two pieces, at its depth (0: before the first, 1: after the last)."""
    placed = sorted(facts, key=lambda fact: fact[0])
    hidden: list[str] = []
    for index, piece in enumerate([*pieces, None]):
        while placed and round(placed[0][0] * len(pieces)) <= index:
            hidden.append(placed.pop(0)[1])
        if piece is not None:
            hidden.append(piece)
    return hidden


def swept_depth(index: int) -> float:
    """Depth of a sample's needle: ten depths, evenly spaced, one sample after the other."""
    return (index * 3 % 10 + 0.5) / 10
