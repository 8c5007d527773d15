"""A table as CSV, Markdown or aligned text; one cell is asked for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import kvpress_moe.benchmark.tasks.vocabulary as words
from kvpress_moe.benchmark.tasks.fact_families import KINDS
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, fill, swept_depth
from kvpress_moe.benchmark.tasks.wording import asked, opening, prefix

_OPENINGS = (
    "The following table is part of a report.",
    "Here is a table. I will ask for one of its entries.",
    "Read this table carefully.",
)


class Column(NamedTuple):
    """A column: its title, the kind of its cells, a question for the cell of ``{s}``, and the answer's beginning."""

    title: str
    kind: str
    question: str
    prefix: str


Names = Callable[[Random, str, int], list[str]]


def _novels(random: Random, split: str, n: int) -> list[str]:
    return random.sample(words.novels(split), min(n, len(words.novels(split))))


def _firms(random: Random, split: str, n: int) -> list[str]:
    return random.sample(words.firms(split), min(n, len(words.firms(split))))


#: Title of the first column, how its cells are made, and the other columns.
TABLES: tuple[tuple[str, Names, tuple[Column, ...]], ...] = (
    (
        "Name",
        words.many_people,
        (
            Column("City", "city", "In which city does {s} live?", "{s} lives in"),
            Column("Age", "age", "How old is {s}?", "The age of {s} is"),
            Column("Employer", "firm", "Who does {s} work for?", "{s} works for"),
            Column("Extension", "extension", "What is the extension of {s}?", "The extension of {s} is"),
            Column("Language", "language", "Which language does {s} speak?", "{s} speaks"),
            Column("Instrument", "instrument", "Which instrument does {s} play?", "{s} plays the"),
        ),
    ),
    (
        "Company",
        _firms,
        (
            Column("Founded", "year", "When was {s} founded?", "{s} was founded in"),
            Column("Head office", "city", "Where is the head office of {s}?", "The head office of {s} is in"),
            Column("Director", "person", "Who is the director of {s}?", "The director of {s} is"),
            Column("Employees", "extension", "How many employees does {s} have?", "The number of employees of {s} is"),
            Column("Colour", "colour", "What is the colour of {s}?", "The colour of {s} is"),
        ),
    ),
    (
        "Novel",
        _novels,
        (
            Column("Author", "person", 'Who wrote "{s}"?', '"{s}" was written by'),
            Column("Year", "year", 'When did "{s}" come out?', '"{s}" came out in'),
            Column("Publisher", "firm", 'Which company published "{s}"?', '"{s}" was published by'),
            Column("Set in", "city", 'In which town is "{s}" set?', '"{s}" is set in'),
            Column("Price", "dollars", 'How much does "{s}" cost?', '"{s}" costs'),
            Column("Pages", "extension", 'How many pages does "{s}" have?', 'The number of pages of "{s}" is'),
        ),
    ),
)


def table(random: Random, count_tokens: CountTokens, length: int, index: int, split: str) -> dict[str, Any]:
    """Four to six columns; the rows fill the context. A row is found by its first cell."""
    check_room("tables", length, 224)
    key, names, columns = random.choice(TABLES)
    chosen = random.sample(columns, random.randint(3, 5))
    rows = [
        [name, *(KINDS[column.kind](random, split) for column in chosen)] for name in names(random, split, length // 8)
    ]
    titles = [key, *(column.title for column in chosen)]
    head, *lines = random.choice((comma_separated, markdown, aligned))(titles, rows)
    before = opening(random, _OPENINGS) + head
    kept = fill(iter(lines), length - count_tokens(before) - 4, count_tokens, joint="\n")
    depth = swept_depth(index)
    row = rows[int(depth * len(kept))]
    place = random.randrange(len(chosen))
    column, answer = chosen[place], row[place + 1]
    plain = f'What does the column "{column.title}" say for {row[0]}?'
    return {
        "context": "\n".join([before, *kept]),
        "question": asked(random, random.choice((column.question.format(s=row[0]), plain)), "table"),
        "answer_prefix": prefix(random, column.prefix.format(s=row[0])),
        "answer": f" {answer}",
        "references": (answer,),
        "metric": "exact",
        "depth": depth,
    }


def comma_separated(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [",".join(cells) for cells in (titles, *rows)]


def markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return [f"{head}\n|{'---|' * len(titles)}", *lines]


def aligned(titles: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (titles, *rows)
    ]
