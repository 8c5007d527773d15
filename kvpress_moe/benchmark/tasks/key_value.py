"""A long list of keys and values, one of which is asked for (RULER's multi-key retrieval without a haystack)."""

from __future__ import annotations

from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.vocabulary import keys

_OPENING = "Below is a list of keys and their values. Make sure to memorize it. I will ask for a value afterwards.\n"


def key_value(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Lines ``"key": "value"`` that fill the context."""
    check_room("a key-value list", length, 128)
    names = random.sample(keys(split), min(len(keys(split)), length))
    made = (f'"{name}": "{random.randrange(10**4, 10**5)}"' for name in names)
    lines = fill(made, length - count_tokens(_OPENING) - 4, count_tokens, joint="\n")
    depth = swept_depth(index)
    name, value = (part.strip('"') for part in lines[int(depth * len(lines))].split(": "))
    return {
        "context": _OPENING + "\n".join(lines),
        "question": f'What is the value of the key "{name}" in the list above?',
        "answer_prefix": f'The value of the key "{name}" is "',
        "answer": value,
        "references": (value,),
        "metric": "exact",
        "depth": depth,
    }
