"""Nested records in JSON, as an array or one a line; one field of one record is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import kvpress_moe.benchmark.tasks.vocabulary as words
from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.wording import asked, opening, prefix

_OPENINGS = (
    "Here is an excerpt of a database in JSON.",
    "The following JSON was returned by a server. I will ask for one of its values.",
    "Look at these records.",
)

#: Path of a field -> kind of its value, question, beginning of the answer.
_PERSON = {
    "age": ("age", "How old is {s}?", "The age of {s} is"),
    "address.street": ("street", "In which street does {s} live?", "{s} lives in"),
    "address.city": ("city", "In which city does {s} live?", "{s} lives in"),
    "job.company": ("firm", "Which company does {s} work for?", "{s} works for"),
    "job.since": ("year", "Since when has {s} had the present job?", "{s} has had the job since"),
    "contact.extension": ("extension", "What is the phone extension of {s}?", "The extension of {s} is"),
    "contact.language": ("language", "In which language should one write to {s}?", "One should write to {s} in"),
    "pet.name": ("pet", "What is the pet of {s} called?", "The pet of {s} is called"),
}
_ORDER = {
    "item.name": ("belonging", "What did {s} order?", "{s} ordered the"),
    "item.price": ("dollars", "How much does the item that {s} ordered cost?", "The item that {s} ordered costs"),
    "item.maker": ("firm", "Who makes the item that {s} ordered?", "The item that {s} ordered is made by"),
    "delivery.street": ("street", "To which street is the order of {s} sent?", "The order of {s} is sent to"),
    "delivery.city": ("city", "To which city is the order of {s} sent?", "The order of {s} is sent to"),
    "delivery.day": ("day", "On which day is the order of {s} delivered?", "The order of {s} is delivered on"),
    "delivery.time": ("clock", "At what time is the order of {s} delivered?", "The order of {s} is delivered at"),
}
_BOOK = {
    "author": ("person", 'Who wrote "{s}"?', '"{s}" was written by'),
    "edition.year": ("year", 'In which year did "{s}" come out?', '"{s}" came out in'),
    "edition.publisher": ("firm", 'Who published "{s}"?', '"{s}" was published by'),
    "edition.language": ("language", 'In which language is "{s}" written?', '"{s}" is written in'),
    "loan.reader": ("person", 'Who has borrowed "{s}"?', '"{s}" was borrowed by'),
    "loan.day": ("day", 'On which day must "{s}" be given back?', '"{s}" must be given back on'),
    "shelf.colour": ("colour", 'Which colour has the shelf of "{s}"?', 'The shelf of "{s}" is'),
}
_KEYS = ((_PERSON, ("name",)), (_ORDER, ("customer", "buyer")), (_BOOK, ("title",)))


def json_records(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Records of two to six fields besides the name that fill the context."""
    check_room("records", length, 224)
    fields, keys = random.choice(_KEYS)
    key = random.choice(keys)
    if fields is _BOOK:
        names = random.sample(words.novels(split), min(len(words.novels(split)), length // 8))
    else:
        names = words.many_people(random, split, length // 8)
    lines = random.random() < 0.4
    indent = None if lines or length < 512 or random.random() < 0.5 else 1
    separators = random.choice(((", ", ": "), (",", ":"))) if indent is None else None

    def records() -> Iterator[str]:
        for name in names:
            paths = random.sample(list(fields), random.randint(2, 6))
            values = {path: KINDS[fields[path][0]](random, split) for path in sorted(paths, key=list(fields).index)}
            yield json.dumps(nested({key: name, **values}), indent=indent, separators=separators)

    before = opening(random, _OPENINGS)
    joint = "\n" if lines else ",\n"
    kept = fill(records(), length - count_tokens(before) - 8, count_tokens, joint, misses=20)
    depth = swept_depth(index)
    record = flat(json.loads(kept[int(depth * len(kept))]))
    path = random.choice([path for path in record if path != key])
    plain = f'What is the value of "{path}" in the record of {record[key]}?'
    question = random.choice((fields[path][1].format(s=record[key]), fields[path][1].format(s=record[key]), plain))
    body = joint.join(kept)
    return {
        "context": before + (body if lines else f"[\n{body}\n]"),
        "question": asked(random, question, random.choice(("data", "records"))),
        "answer_prefix": prefix(random, fields[path][2].format(s=record[key])),
        "answer": f" {record[path]}",
        "references": (record[path],),
        "metric": "exact",
        "depth": depth,
    }


def nested(record: dict[str, str]) -> dict[str, Any]:
    """``{"a.b": "c"}`` as ``{"a": {"b": "c"}}``."""
    tree: dict[str, Any] = {}
    for path, value in record.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flat(tree: dict[str, Any], before: str = "") -> dict[str, str]:
    """The inverse of :func:`nested`."""
    record: dict[str, str] = {}
    for name, value in tree.items():
        record |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return record
