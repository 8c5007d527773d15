"""Records of a run: JSON lines that survive a kill, and a header that says what they are records of."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpress_moe.checkpoint import write_atomically
from kvpress_moe.errors import SettingError

FORMAT = 1
COLUMNS = ("method", "ratio", "score", "nll", "kl", "hit", "pairs", "bytes", "seconds")
HEADER, RECORDS = "run.json", "records.jsonl"

#: What two sessions of one run must have in common.
_IDENTITY = ("format", "model", "fingerprint", "seed", "split", "setting", "sinks", "recent", "min_share")


class Records:
    """
    The records of one run, in a directory.

    Each sample is one line, written at once; a line that a kill cut short is cut off when the run goes on. A sample may
    have several lines, each with other methods or ratios.

    Parameters
    ----------
    directory : Path
        Made if it is not there.
    header : dict
        What the records are records of; methods and commands of earlier sessions are kept in it.

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
        commands = [*earlier["commands"], *(c for c in header["commands"] if c not in earlier["commands"])]
        versions = earlier["versions"] | header["versions"]
        return earlier | header | {
            "methods": earlier["methods"] | header["methods"], "commands": commands, "versions": versions
        }  # fmt: skip

    def _mend(self) -> None:
        """Unpack records that were gzipped; cut off a last line that was not written to its end."""
        packed = self.path.with_suffix(".jsonl.gz")
        if packed.exists() and not self.path.exists():
            write_atomically(self.path, lambda path: path.write_bytes(gzip.decompress(packed.read_bytes())))
            packed.unlink()
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)

    def done(self) -> dict[str, set[tuple[str, float]]]:
        """Sample -> the cells (method, ratio) that are recorded."""
        cells: dict[str, set[tuple[str, float]]] = {}
        for record in read_records(self.directory):
            cells.setdefault(record["sample"], set()).update((row[0], row[1]) for row in record["results"])
        return cells

    def add(self, record: dict[str, Any]) -> None:
        """
        Append a sample's line; all of it or nothing.

        Raises
        ------
        SettingError
            If the disk is full; earlier records are intact.
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


def rounded(value: Any, digits: int | None = 5) -> Any:
    """Floats to so many significant digits (None: all of them), NaN and infinities to null."""
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
    """The header of a run; raises SettingError where there is none that can be read."""
    path = Path(directory) / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            "RUN", str(directory), f"a directory with a {HEADER}", f"{type(error).__name__}: {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise SettingError("RUN", str(path), f"format {FORMAT}", f"It says {header.get('format')!r}.")
    return header


def read_records(directory: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run, plain or gzipped; a last line that was cut short is left out."""
    plain = Path(directory) / RECORDS
    path = plain if plain.exists() else plain.with_suffix(".jsonl.gz")
    if not path.exists():
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
