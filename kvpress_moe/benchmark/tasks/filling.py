"""Contexts of a given length: filler, with facts hidden at given depths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

from kvpress_moe.errors import SettingError

CountTokens = Callable[[str], int]


def check_room(field: str, length: int, needed: int) -> None:
    """Raise SettingError if a context of this length is too short."""
    if length < needed:
        raise SettingError("lengths", length, f"at least {needed} tokens for {field}", "Ask for a longer context.")


def cycle_sentences(random: Random, sentences: Sequence[str]) -> Iterator[str]:
    """Sentences in their own order from a random start, repeated without end."""
    start = random.randrange(len(sentences))
    return (sentences[(start + step) % len(sentences)] for step in count())


def fill(filler: Iterator[str], room: int, count_tokens: CountTokens, joint: str = " ", misses: int = 1) -> list[str]:
    """
    Pieces of filler that together have at most ``room`` tokens, and nearly as many.

    Pieces that do not fit are passed over. The ``misses``-th of them ends the filling.

    Raises
    ------
    SettingError
        If there is too little filler to fill the room.
    """
    pieces: list[str] = []
    used = 0
    for piece in filler:
        cost = count_tokens(joint + piece)
        if used + cost <= room:
            used += cost
            pieces.append(piece)
            continue
        misses -= 1
        if misses == 0:
            break
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
    """Depth of a sample's needle. Consecutive samples take ten evenly spaced depths in turn."""
    return (index * 3 % 10 + 0.5) / 10
