"""Precision: with how many bits the keys and the values of a pair are stored, and menus of precisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.transform_codes import TRANSFORM_BITS, key_bytes
from kvpress_moe.codes.vector_codes import BITS, vector_bytes
from kvpress_moe.errors import SettingError

WHOLE = 16  # stands for "as the model wrote it", also in a model of float32


@dataclass(frozen=True)
class Precision:
    """
    Bits of a channel, for the keys and for the values of a pair.

    Attributes
    ----------
    key_bits, value_bits : {2, 3, 4, 5, 6, 8, 16}
        16 means that the vector stays as the model wrote it.
    """

    key_bits: int
    value_bits: int

    def __str__(self) -> str:
        return f"K{self.key_bits}V{self.value_bits}"

    def nbytes(self, head_dim: int, element_size: int, basis: KeyBasis | None = None) -> int:
        """
        Bytes of a pair, with the scales and positions of its codes.

        Parameters
        ----------
        head_dim : int
        element_size : int
            Bytes of a number that the model wrote, 2 in a 16-bit cache.
        basis : KeyBasis, optional
            With a basis, keys of few bits are transform codes.
        """
        whole = head_dim * element_size
        value = whole if self.value_bits == WHOLE else vector_bytes(head_dim, self.value_bits)
        if basis is not None and self.key_bits in TRANSFORM_BITS:
            return value + key_bytes(head_dim, self.key_bits, basis.n_positions)
        return value + (whole if self.key_bits == WHOLE else vector_bytes(head_dim, self.key_bits))


#: The menu of ``precision="mixed"`` where keys are coded without a transform, cheapest first.
MIXED = tuple(Precision(*bits) for bits in ((4, 2), (5, 3), (6, 4), (8, 4), (8, 8), (WHOLE, WHOLE)))
#: The same with a transform, which needs about half of the bits for keys.
MIXED_TRANSFORMED = tuple(Precision(*bits) for bits in ((2, 2), (2, 3), (3, 3), (4, 4), (6, 4), (8, 8), (WHOLE, WHOLE)))


def menu_of(precision: Any, transformed: bool = False) -> tuple[Precision, ...]:
    """
    The precisions that a setting allows: ``"mixed"``, or pairs of key bits and value bits.

    Parameters
    ----------
    precision : object
        The setting.
    transformed : bool
        Whether the routers have key transforms. ``"mixed"`` then has fewer bits for keys.

    Raises
    ------
    SettingError
        For anything else, for an empty menu, and for a precision that is named twice.
    """
    if precision == "mixed":
        return MIXED_TRANSFORMED if transformed else MIXED
    allowed = (*BITS, WHOLE)
    expected = f"None, 'mixed', or a list of (key bits, value bits), each one of {', '.join(map(str, allowed))}"
    remedy = "For example precision=[(8, 4)]. 16 leaves keys or values as the model wrote them."
    if isinstance(precision, str) or not isinstance(precision, Iterable):
        raise SettingError("precision", precision, expected, remedy)
    entries = list(precision)
    menu = []
    for entry in entries:
        bits = (entry.key_bits, entry.value_bits) if isinstance(entry, Precision) else entry
        if not (isinstance(bits, (tuple, list)) and len(bits) == 2 and all(_is_allowed(one, allowed) for one in bits)):
            raise SettingError("precision", entries, expected, remedy)
        menu.append(Precision(int(bits[0]), int(bits[1])))
    if not menu or len(set(menu)) < len(menu):
        raise SettingError("precision", entries, "at least one precision, each named once", remedy)
    return tuple(menu)


def _is_allowed(bits: Any, allowed: tuple[int, ...]) -> bool:
    return isinstance(bits, Integral) and not isinstance(bits, bool) and bits in allowed
