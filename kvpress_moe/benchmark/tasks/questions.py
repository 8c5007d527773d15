"""Questions about generated documents: people, firms and places; one and two hops."""

from __future__ import annotations

from random import Random
from typing import Any

from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.vocabulary import cities, firms, people, professions

_OPENING = "Read the following notes. I will ask a question about them afterwards.\n\n"


def question(
    random: Random, count_tokens: CountTokens, length: int, index: int, split: str, *, hops: int = 1
) -> dict[str, Any]:
    """
    Notes on people (city, profession, firm) and on firms (city of the head office).

    One hop asks for a person's city. Two hops ask for the head office of the firm that a person works for.
    """
    check_room("questions over documents", length, 256)
    names = random.sample(people(split), min(len(people(split)), length // 20))
    employers = random.sample(firms(split), max(2, len(names) // 2))
    towns = random.sample(cities(split), min(len(cities(split)), len(names) + len(employers)))
    offices = {firm: towns[number % len(towns)] for number, firm in enumerate(employers)}
    homes, works = {}, {}
    notes = []
    for number, name in enumerate(names):
        homes[name] = towns[(len(employers) + number) % len(towns)]
        works[name] = employers[number % len(employers)]
        job = random.choice(professions())
        year = random.randrange(1950, 2000)
        notes.append(
            f"{name} was born in {year} and lives in {homes[name]}. {name} is a trained {job} and works for "
            f"{works[name]}."
        )
        if number < len(employers):
            firm = employers[number]
            founded = random.randrange(1850, 2010)
            notes.append(f"{firm} was founded in {founded}. The head office of {firm} is in {offices[firm]}.")
    kept = fill(iter(notes), length - count_tokens(_OPENING) - 4, count_tokens, joint="\n")
    random.shuffle(kept)
    persons = [note.split(" was born")[0] for note in kept if " was born" in note]
    known = {firm for firm in employers if any(note.startswith(firm) for note in kept)}
    asked = [name for name in persons if hops == 1 or works[name] in known]
    depth = swept_depth(index)
    name = asked[int(depth * len(asked))]
    if hops == 1:
        answer = homes[name]
        asks, prefix = f"In which city does {name} live?", f"{name} lives in"
    else:
        answer = offices[works[name]]
        asks = f"In which city is the head office of the firm that {name} works for?"
        prefix = f"The head office of the firm that {name} works for is in"
    return {
        "context": _OPENING + "\n".join(kept),
        "question": asks,
        "answer_prefix": prefix,
        "answer": f" {answer}",
        "references": (answer,),
        "metric": "exact",
        "depth": kept.index(next(note for note in kept if note.startswith(name))) / len(kept),
    }
