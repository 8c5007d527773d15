"""Records of a run: JSON lines that survive a kill, and a header with the settings of the run."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpress_moe.errors import SettingError
from kvpress_moe.files import (
    MAX_JSON,
    check_is_file,
    is_number,
    is_text,
    is_whole,
    parse_json,
    read_json,
    write_atomically,
)

FORMAT = 1
COLUMNS = ("method", "ratio", "score", "nll", "kl", "hit", "pairs", "bytes", "seconds")
HEADER, RECORDS = "run.json", "records.jsonl"
_MOST_PACKED = 50  # times that records may grow when they are unpacked; real records grow 4 times

_UNREADABLE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError)

#: Fields that must be the same in all sessions of a run.
_IDENTITY = ("format", "model", "fingerprint", "seed", "split", "setting", "sinks", "recent", "min_share", "min_pairs")


class Records:
    """
    The records of one run, in a directory.

    Each sample is one line, written at once. If a kill left an incomplete last line, it is removed when the run
    continues. A sample may have several lines, each with other methods or ratios.

    Parameters
    ----------
    directory : Path
        Created if it does not exist.
    header : dict
        Settings of the run. Methods and commands of earlier sessions are kept in it.

    Raises
    ------
    SettingError
        If the directory holds the records of another run.
    """

    def __init__(self, directory: Path, header: dict[str, Any]):
        self.directory = Path(directory)
        self.path = self.directory / RECORDS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError("out", str(directory), "a directory that can be written", str(error)) from error
        self.header = self._join(header)
        text = json.dumps(self.header, indent=1)
        write_atomically(self.directory / HEADER, lambda path: path.write_text(text, encoding="utf-8"))
        self._mend()

    def _join(self, header: dict[str, Any]) -> dict[str, Any]:
        path = self.directory / HEADER
        if not path.exists():
            if self.path.exists():
                raise SettingError("out", str(self.directory), f"a run with its {HEADER}", "Name another directory.")
            return header
        earlier = read_header(self.directory)
        for field in _IDENTITY:
            if earlier.get(field) != header.get(field):
                raise SettingError(
                    "out",
                    str(self.directory),
                    f"records of the same run; {field} was {earlier.get(field)!r} and is now {header.get(field)!r}",
                    "Name another directory.",
                )
        for name in earlier["methods"].keys() & header["methods"].keys():
            change = _change(earlier["methods"][name], header["methods"][name])
            if change:
                raise SettingError(
                    "out",
                    str(self.directory),
                    f"records of the same methods; {name} has changed: {change}",
                    "Name another directory.",
                )
        commands = [*earlier["commands"], *(c for c in header["commands"] if c not in earlier["commands"])]
        versions = earlier["versions"] | header["versions"]
        return earlier | header | {
            "methods": earlier["methods"] | header["methods"], "commands": commands, "versions": versions
        }  # fmt: skip

    def _mend(self) -> None:
        """Unpack gzipped records; remove an incomplete last line."""
        packed = self.path.with_suffix(".jsonl.gz")
        if packed.exists() and not self.path.exists():
            write_atomically(self.path, lambda path: _unpack(packed, path))
            packed.unlink()
        if not self.path.exists():
            return
        try:
            with self.path.open("rb+") as file:
                data = file.read()
                file.truncate(data.rfind(b"\n") + 1)
        except OSError as error:
            raise SettingError("out", str(self.path), "a file that can be written", f"{error}.") from error

    def done(self) -> dict[str, set[tuple[str, float]]]:
        """Sample -> the cells (method, ratio) that are recorded."""
        cells: dict[str, set[tuple[str, float]]] = {}
        for record in read_records(self.directory):
            cells.setdefault(record["sample"], set()).update((row[0], row[1]) for row in record["results"])
        return cells

    def add(self, record: dict[str, Any]) -> None:
        """
        Append a sample's line, completely or not at all.

        Raises
        ------
        SettingError
            If the disk is full. Earlier records are intact.
        """
        line = json.dumps(rounded(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError("short write")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(before)
                raise SettingError(
                    "out", str(self.path), "a disk with room", f"{error}. Earlier records are intact; make room, go on."
                ) from error


def _change(earlier: dict[str, str], now: dict[str, str]) -> str | None:
    """What is new in a method since its earlier records. Old records do not tell their routers."""
    if earlier.get("revision") != now.get("revision"):
        return now.get("revision", "the records are of a later release")
    if earlier.get("routers", now.get("routers")) != now.get("routers"):
        return "its routers have other weights"
    return None


def rounded(value: Any, digits: int | None = 5) -> Any:
    """Round floats to ``digits`` significant digits (None: keep all). NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def read_header(directory: Path) -> dict[str, Any]:
    """The header of a run. Raises SettingError if it cannot be read."""
    path = Path(directory) / HEADER
    try:
        header = read_json(path)
        if not isinstance(header, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise SettingError(
            "RUN", str(directory), f"a directory with a {HEADER}", f"{type(error).__name__}: {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise SettingError("RUN", str(path), f"format {FORMAT}", f"It says {str(header.get('format'))[:80]!r}.")
    try:
        _check_header(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise SettingError("RUN", str(path), "a header that `bench` wrote", text) from error
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise if a header lacks something that a report needs, or has a wrong type."""
    for name in ("model", "setting", "split"):
        if not is_text(header[name]):
            raise ValueError(f"{name}: expected a text")
    for name in ("seed", "sinks", "recent"):
        if not is_number(header[name]):
            raise ValueError(f"{name}: expected a number")
    if not isinstance(header["commands"], list):
        raise ValueError("commands: expected a list")
    texts = (header["commands"], header["versions"], header["versions"].values(), header["methods"])
    if not all(is_text(text) for several in texts for text in several):
        raise ValueError("commands, versions or methods: expected texts")
    if not all(is_text(text) for about in header["methods"].values() for text in about.values()):
        raise ValueError("methods: expected texts about each, such as its group")


def read_records(directory: Path) -> Iterator[dict[str, Any]]:
    """
    The records of a run, plain or gzipped. An incomplete last line is left out.

    Raises
    ------
    SettingError
        If a line is not a record or is longer than 1 MiB, or if the file cannot be read.
    """
    plain = Path(directory) / RECORDS
    path = plain if plain.exists() else plain.with_suffix(".jsonl.gz")
    if not path.exists():
        return
    number = 1
    try:
        for line in _lines(path):
            record = parse_json(line.decode())
            _check_record(record)
            yield record
            number += 1
    except _UNREADABLE as error:
        text = f"Line {number}: {type(error).__name__}: {error}"
        raise SettingError("RUN", str(path), "records that `bench` wrote", text) from error


def _lines(path: Path) -> Iterator[bytes]:
    """Complete lines of a file, plain or gzipped. Raises ValueError if one line or all together are too long."""
    check_is_file(path)
    left = _MOST_PACKED * path.stat().st_size + MAX_JSON
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while (line := file.readline(MAX_JSON + 1)).endswith(b"\n"):
            left -= len(line)
            if left < 0:
                raise ValueError(f"more than {_MOST_PACKED} times the packed size")
            yield line
        if len(line) > MAX_JSON:
            raise ValueError(f"a line of more than {MAX_JSON} bytes")


def _unpack(packed: Path, path: Path) -> None:
    try:
        with path.open("wb") as file:
            file.writelines(_lines(packed))
    except _UNREADABLE as error:
        raise SettingError("out", str(packed), "gzipped records", f"{type(error).__name__}: {error}") from error


def _check_record(record: Any) -> None:
    """Raise if a record does not have the form that ``bench`` writes."""
    if not (is_text(record["sample"]) and is_text(record["task"]) and is_whole(record["length"])):
        raise ValueError("sample, task or length is wrong")
    if not all(record.get(name) is None or is_number(record[name]) for name in ("depth", "prefill_s")):
        raise ValueError("depth or prefill_s is no number")
    if record["columns"] != list(COLUMNS):
        raise ValueError(f"columns: expected {', '.join(COLUMNS)}")
    for method, ratio, *values in record["results"]:
        if not (is_text(method) and is_number(ratio) and 0 <= ratio <= 1 and len(values) == len(COLUMNS) - 2):
            raise ValueError(f"results: expected rows of {', '.join(COLUMNS)}")
        if not all(value is None or is_number(value) for value in values):
            raise ValueError("results: expected numbers or null")
