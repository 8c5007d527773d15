"""Prose and code that are part of every Python installation, split by topic and by module."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from random import Random
from typing import cast

from kvpress_moe.benchmark.tasks.vocabulary import bucket

_SALT = "e"  # with it the splits have about 3/5, 1/5 and 1/5 of the characters
_MODULES = """
argparse ast bdb bisect calendar cmd code codecs colorsys configparser contextlib copy csv dataclasses datetime decimal
difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools getopt gettext glob gzip hashlib heapq
hmac imaplib inspect ipaddress keyword linecache locale mailbox mimetypes netrc ntpath numbers optparse pathlib pdb
pickle pickletools platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr queue quopri random
reprlib sched selectors shelve shlex shutil smtplib socket socketserver statistics string stringprep subprocess tabnanny
tarfile telnetlib tempfile textwrap threading timeit tokenize trace traceback turtle typing urllib.parse urllib.request
uuid warnings wave weakref webbrowser zipapp zipfile
"""


@cache
def unique_topics() -> dict[str, str]:
    """
    Topic -> its text, from the language reference that ``help()`` shows (``pydoc_data.topics``).

    Topics repeat whole sections of each other. Each paragraph is kept only in the longest topic that has it.
    """
    from pydoc_data.topics import topics as texts

    seen: set[str] = set()
    unique = {}
    for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
        own = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = re.sub(r"\W+", " ", paragraph)
            if words not in seen:
                own.append(paragraph)
            if len(words) > 30:
                seen.add(words)
        unique[name] = "\n\n".join(own)
    return {name: text for name, text in unique.items() if len(text) > 400}


@cache
def topics(split: str) -> dict[str, str]:
    """The topics of a split."""
    return {name: text for name, text in unique_topics().items() if bucket(f"{_SALT} {name}") == split}


@cache
def sentences(split: str) -> tuple[str, ...]:
    """The prose of a split as sentences, without tables, grammar and code."""
    found = []
    for text in topics(split).values():
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            prose = len(words) > 80 and "::" not in words and "|" not in words and "==" not in words
            if prose and sum(c.isalpha() or c in " ,.'" for c in words) > 0.9 * len(words):
                found += re.split(r"(?<=[.!?]) (?=[A-Z])", words)
    return tuple(dict.fromkeys(sentence for sentence in found if 30 < len(sentence) < 400))


@cache
def modules(split: str) -> tuple[str, ...]:
    """Modules of the standard library whose source belongs to a split."""
    names = (name for name in _MODULES.split() if bucket(f"module {name}") == split)
    return tuple(name for name in names if _source_path(name) is not None)


def _source_path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # removed in later releases of Python
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


@cache
def source(module: str) -> str:
    """Source text of a module."""
    return cast(Path, _source_path(module)).read_text(encoding="utf-8")


def running_text(random: Random, texts: list[str], n_characters: int) -> str:
    """``n_characters`` of consecutive text from a random start. If one text ends, others follow."""
    order = list(texts)
    random.shuffle(order)
    first = order[0]
    start = random.randrange(max(1, len(first) - n_characters)) if len(first) > n_characters else 0
    start = first.find("\n", start) + 1
    text, index = first[start:], 1
    while len(text) < n_characters:
        text += "\n\n" + order[index % len(order)]
        index += 1
    return text[:n_characters]
