"""Names of precisions, as the command line and the web app read them. This module imports no PyTorch."""

from __future__ import annotations

import re

from kvpress_moe.errors import SettingError

ALLOWED = (2, 3, 4, 5, 6, 8, 16)  # bits; 16: as the model wrote it


def parse_precision(text: str | None) -> str | list[tuple[int, int]] | None:
    """
    ``"k8v4,k4v2"`` -> ``[(8, 4), (4, 2)]``. ``"mixed"`` and ``None`` stay as they are.

    Raises
    ------
    SettingError
    """
    if text is None or text == "mixed":
        return text
    found = [re.fullmatch(r"k([0-9]{1,2})v([0-9]{1,2})", name.strip(), re.IGNORECASE) for name in text.split(",")]
    menu = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if (
        len(menu) < len(found)
        or not all(bits in ALLOWED for pair in menu for bits in pair)
        or len(set(menu)) < len(menu)
    ):
        raise SettingError(
            "precision",
            text,
            f"mixed, or names such as k8v4, separated by commas, with bits of {', '.join(map(str, ALLOWED))}",
            "For example --precision mixed.",
        )
    return menu
