"""Variable tracking: a chain of assignments in noise (RULER, arXiv 2404.06654)."""

from __future__ import annotations

from itertools import cycle, pairwise
from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, hide, swept_depth
from kvpress_moe.benchmark.tasks.needles import NOISE, enumeration

_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
_EXAMPLE = (
    "VAR ABCDE = 11111 The grass is green. VAR FGHIJ = VAR ABCDE The sky is blue. VAR KLMNO = VAR FGHIJ Here we go. "
    "VAR PQRST = VAR KLMNO There and back again. VAR UVWXY = VAR PQRST\n"
    "Question: Find all variables that are assigned the value 11111. "
    "Answer: the variables are ABCDE, FGHIJ, KLMNO, PQRST, and UVWXY.\n\n"
)
_HOPS = 4
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def variable_tracking(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """One chain of four hops (RULER's default). Its links are in order, at random depths."""
    check_room("variable tracking", length, 320)
    names = ["".join(random.choices(_LETTERS, k=5)) for _ in range(_HOPS + 1)]
    value = str(random.randrange(10**4, 10**5))
    depth = swept_depth(index) * 0.5
    depths = [depth, *sorted(random.uniform(depth, 1.0) for _ in range(_HOPS))]
    texts = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(names))]
    facts = list(zip(depths, texts, strict=True))
    opening = _EXAMPLE + _OPENING
    room = length - count_tokens(opening) - sum(count_tokens(" " + text) for _, text in facts) - 4
    body = " ".join(hide(fill(cycle(NOISE), room, count_tokens), facts))
    return {
        "context": opening + body,
        "question": f"Find all variables that are assigned the value {value} in the text above.",
        "answer_prefix": (
            "According to the chain(s) of variable assignment in the text above, the 5 variables that are assigned the "
            f"value {value} are"
        ),
        "answer": f" {enumeration(names)}",
        "references": tuple(names),
        "metric": "f1",
        "depth": depth,
    }
