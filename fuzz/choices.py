"""Bytes as a source of decisions, so that Hypothesis and Atheris can steer the same mutations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices:
    """
    Decisions taken from bytes, one after the other. After the last byte every decision is the first choice.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def raw(self, size: int) -> bytes:
        """The next bytes; missing ones are zeros."""
        found = self.data[self.at : self.at + size]
        self.at += size
        return found.ljust(size, b"\0")

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound - 1``."""
        return int.from_bytes(self.raw(1 if bound <= 256 else 3), "little") % max(1, bound)

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def one_in(self, number: int) -> bool:
        """True once in ``number`` times; never after the last byte."""
        return self.below(number) == number - 1
