"""Mutations of files: changes that respect a format (JSON, safetensors, gzip), and changes of raw bytes."""

from __future__ import annotations

import copy
import gzip
import json
import math
import struct
from collections.abc import Callable
from typing import Any

from fuzz.choices import Choices

DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U16", "X", "", 7)
NAMES = (
    "../../out",
    "/etc/passwd",
    "..",
    "",
    "a\0b",
    "layers.0.down.weight",
    "\ud83d\ude00",
    "n" * 5000,
    "a/b\\c",
    "0.keys",
)
NUMBERS = (0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 10**400)
FLOATS = (0.5, 1.0, -0.1, 1e308, -1e308, 1e-308, math.nan, math.inf, -math.inf)
OTHERS: tuple[Any, ...] = (None, True, False, "", "x", "\ud800", [], {}, [[]], [None], {"a": 1}, "1", "nan", "9" * 5000)


def junk(choices: Choices) -> Any:
    """An unexpected value that JSON can hold."""
    kind = choices.below(64)
    if kind == 37:  # deep nesting; sometimes deeper than the stack allows
        return Raw("[" * (100_000 if choices.one_in(16) else 2_000))
    if kind == 23:  # thirty times as large after parsing; near the size limit of the parser
        return Raw("[" + "[]," * (choices.pick((340_000, 350_000)) if choices.one_in(16) else 1_000) + "[]]")
    if kind == 61:
        return Raw(choices.pick(("-", "1e999", "0x10", "nul", "'a'", "{", '"\\ud800"', "\x00", "1" * 5000)))
    if kind >= 40:
        return copy.deepcopy(choices.pick(OTHERS))
    return choices.pick(NUMBERS if kind >= 12 else FLOATS if kind >= 6 else NAMES)


class Raw(str):
    """Text that is put into JSON unchanged."""


def dump(value: Any) -> str:
    """JSON text of a value that may contain raw parts."""
    raws: list[Raw] = []

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            raws.append(item)
            return f"\x01{len(raws) - 1}\x01"
        if isinstance(item, dict):
            return {key: mark(part) for key, part in item.items()}
        return [mark(part) for part in item] if isinstance(item, list) else item

    text = json.dumps(mark(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"\\u0001{number}\\u0001"', raw)
    return text


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in items] + [place for _, part in items for place in places(part)]


def mutate_json(choices: Choices, value: Any) -> Any:
    """A copy of a value with one to three changes in it."""
    value = copy.deepcopy(value)
    for _ in range(1 + choices.below(3)):
        found = places(value)
        if not found or choices.one_in(40):
            return junk(choices)
        container, key = choices.pick(found)
        change = choices.below(8)
        if change == 6 and isinstance(container, dict):
            container[choices.pick(NAMES)] = junk(choices)
        elif change == 6:
            container.append(copy.deepcopy(choices.pick(container)))
        elif change == 7:
            del container[key]
        elif change == 5:
            container[key] = copy.deepcopy(choices.pick([c[k] for c, k in found]))
        elif change >= 3 and type(container[key]) in (int, float):
            container[key] += choices.pick((1, -1, 2, 0.5, 2**40))
        else:
            container[key] = junk(choices)
    return value


def mutate_bytes(choices: Choices, data: bytes) -> bytes:
    """A copy of the bytes with some of them flipped, removed, inserted or doubled."""
    changed = bytearray(data)
    for _ in range(1 + choices.below(4)):
        at = choices.below(len(changed) + 1)
        kind = choices.below(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << choices.below(8)
        elif kind == 1 and at < len(changed):
            changed[at] = choices.below(256)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = choices.raw(1 + choices.below(16))
        elif kind == 4:
            del changed[at : at + 1 + choices.below(64)]
        else:
            changed += changed[at : at + 64]
    return bytes(changed)


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_tensors(header: Any, body: bytes) -> bytes:
    text = dump(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def mutate_tensors(choices: Choices, data: bytes) -> bytes:
    """A safetensors file with changed names, dtypes, shapes, offsets, metadata, numbers or bytes."""
    kind = choices.below(10)
    if kind == 0:
        return mutate_bytes(choices, data)
    header, body = split_tensors(data)
    names = [name for name in header if name != "__metadata__"]
    name = choices.pick(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == 1:
        header = mutate_json(choices, header)
    elif kind == 2:  # NaN, infinity or random bits
        step = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}.get(entry["dtype"], 1)
        infinite = {2: b"\x00\x7c", 4: b"\x00\x00\x80\x7f", 8: b"\0\0\0\0\0\0\xf0\x7f"}.get(step, b"\xff")
        bad = choices.pick((b"\xff" * step, infinite, choices.raw(step)))
        at = start + step * choices.below(max(1, (end - start) // step))
        body = body[:at] + bad + body[at + step :] if end > start else body
    elif kind == 3:
        entry["dtype"] = choices.pick(DTYPES)
    elif kind == 4:  # other shapes of the same number of bytes
        shape = entry["shape"]
        entry["shape"] = choices.pick(
            (shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], [2, *shape], shape[1:])
        )
    elif kind == 5:
        entry["shape"] = [choices.pick(NUMBERS) for _ in range(choices.below(5))]
    elif kind == 6:
        entry["data_offsets"] = [choices.pick((start, end, *NUMBERS)), choices.pick((end, start, *NUMBERS))]
    elif kind == 7:
        header[choices.pick(NAMES)] = header.pop(name)
    elif kind == 8:  # one tensor more or less; the rest is correct
        if choices.below(2):
            header[choices.pick(NAMES)] = {"dtype": "U8", "shape": [0, choices.pick(NUMBERS)], "data_offsets": [0, 0]}
        else:
            del header[name]
            body = body[:start] + body[end:]
            for other in header:
                if other != "__metadata__" and header[other]["data_offsets"][0] >= end:
                    header[other]["data_offsets"] = [at - (end - start) for at in header[other]["data_offsets"]]
    elif kind == 9:
        changed = join_tensors(header, body)
        length = choices.pick((0, 1, 7, len(changed), 2**22 + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + changed[8:]
    return join_tensors(header, body)


def mutate_lines(choices: Choices, data: bytes) -> bytes:
    """JSON lines; one of them is changed, repeated or damaged."""
    lines = data.splitlines(keepends=True)
    number = choices.below(len(lines))
    kind = choices.below(5)
    if kind == 0:
        lines[number] = mutate_bytes(choices, lines[number])
    elif kind == 4:
        lines += [lines[number]] * choices.pick((1, 2, 20))
    else:
        changed = dump(mutate_json(choices, json.loads(lines[number])))
        lines[number] = changed.encode("utf-8", "surrogatepass") + b"\n"
    return b"".join(lines)


def mutate_gzip(choices: Choices, data: bytes, change: Callable[[Choices, bytes], bytes] = mutate_lines) -> bytes:
    """A gzip file with changed lines, a damaged gzip file, or one that unpacks to a much larger size."""
    data = gzip.decompress(data)
    kind = choices.below(32)
    if kind == 17:
        size = choices.pick((2**16, 2**18, 2**20, 2**24 if choices.one_in(64) else 2**20))
        filling = choices.pick((b"[", b" ", b"\n", data.splitlines(keepends=True)[0]))
        return gzip.compress((filling * (size // len(filling)))[:size] + b"\n", 9)
    if kind >= 20:
        return mutate_bytes(choices, gzip.compress(data))
    return gzip.compress(change(choices, data), 1)
