"""How many calibration prompts a confidence needs. This module imports no PyTorch."""

from __future__ import annotations

import math


def prompts_needed(confidence: float) -> int:
    """The smallest number of calibration prompts with which a confidence in (0, 1) can be promised."""
    return math.ceil(round(confidence / (1 - confidence), 9))
