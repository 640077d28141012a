"""Reading task files: JSON lines, CSV and label lists, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import lzma
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError


@dataclass(frozen=True)
class Record:
    """One item of a task file; its accessors check what they give."""

    values: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A string that is not blank."""
        value = self.string(key)
        if not value.strip():
            raise LarosaError(f"{self.where}: '{key}' must be a string that is not blank, not {_shown(value)}")
        return value

    def string(self, key: str) -> str:
        """A string, which may be empty."""
        value = self._get(key, "a string")
        if not isinstance(value, str):
            raise LarosaError(f"{self.where}: '{key}' must be a string, not {_shown(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """Two strings or more, none blank."""
        value = self._get(key, "a list of strings")
        if (
            not isinstance(value, list)
            or len(value) < 2
            or not all(isinstance(text, str) and text.strip() for text in value)
        ):
            raise LarosaError(
                f"{self.where}: '{key}' must be a list of two or more strings, none blank, not {_shown(value)}"
            )
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...]) -> Any:
        """One of the allowed values, of the same type."""
        value = self._get(key, f"one of {', '.join(map(repr, allowed))}")
        for candidate in allowed:
            if type(value) is type(candidate) and value == candidate:
                return value
        raise LarosaError(f"{self.where}: '{key}' must be one of {', '.join(map(repr, allowed))}, not {_shown(value)}")

    def index(self, key: str, count: int) -> int:
        """A whole number from 0 to `count` - 1: which of `count` answers is right."""
        value = self._get(key, "the index of the right answer")
        if type(value) is not int or not 0 <= value < count:
            raise LarosaError(
                f"{self.where}: '{key}' must be the index of the right answer, 0 to {count - 1}, not {_shown(value)}"
            )
        return value

    def _get(self, key: str, what: str) -> Any:
        if key not in self.values:
            present = ", ".join(self.values) or "none"
            raise LarosaError(f"{self.where}: no '{key}' (wanted: {what}); the keys here are: {present}")
        return self.values[key]


def json_lines(path: Path) -> list[Record]:
    """The items of a .jsonl file, or of one compressed as .jsonl.xz."""
    records = []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise LarosaError(f"{where}: not JSON; every line must be one JSON object") from None
        if not isinstance(values, dict):
            raise LarosaError(f"{where}: not a JSON object; every line must be one")
        records.append(Record(values, where))
    return records


def labels(path: Path, allowed: tuple[str, ...]) -> list[int]:
    """The labels of a file with one a line: the position of each among those allowed."""
    numbers = []
    for number, line in enumerate(_lines(path), 1):
        label = line.strip()
        if label not in allowed:
            raise LarosaError(f"{path}, line {number}: the label must be {' or '.join(allowed)}, not {_shown(label)}")
        numbers.append(allowed.index(label))
    return numbers


def csv_archive(path: Path) -> dict[str, list[Record]]:
    """The items of every .csv file in a .tar.xz archive, by the file's name in it.

    Nothing is unpacked to disk. Every file has a header line with the keys.
    """
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_content(path)), mode="r:") as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isfile() and member.name.endswith(".csv") else None
                if source is not None:
                    name = member.name.removeprefix("./")
                    files[name] = _csv_records(source.read(), f"{path}: {name}")
    except tarfile.TarError as error:
        raise LarosaError(f"{path}: not a whole .tar.xz archive ({error}); fetch it again") from None
    return files


def csv_records(path: Path) -> list[Record]:
    """The items of a .csv file, which has a header line with the keys."""
    return _csv_records(_content(path), str(path))


def _csv_records(content: bytes, name: str) -> list[Record]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LarosaError(f"{name}, line {line}: not UTF-8; save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = row
                continue
            where = f"{name}, line {reader.line_num}"
            if len(row) != len(header):
                raise LarosaError(f"{where}: {len(row)} fields where the header names {len(header)}")
            records.append(Record(dict(zip(header, row, strict=True)), where))
    except csv.Error as error:
        raise LarosaError(f"{name}, line {reader.line_num}: not CSV ({error})") from None
    if not records:
        raise LarosaError(f"{name}: no items; wanted a header line and one item a line")
    return records


def _content(path: Path) -> bytes:
    """The bytes of a file, without its .xz compression."""
    try:
        content = path.read_bytes()
        return lzma.decompress(content) if path.suffix == ".xz" else content
    except FileNotFoundError:
        raise LarosaError(
            f"{path} is missing; put the file there, or leave its task out (docs/tasks.md lists the files)"
        ) from None
    except lzma.LZMAError as error:
        raise LarosaError(f"{path}: not a whole .xz file ({error}); fetch it again") from None
    except OSError as error:
        raise LarosaError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None


def _lines(path: Path) -> list[str]:
    raw = _content(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not raw[-1].strip():
        raw.pop()
    if not raw:
        raise LarosaError(f"{path}: empty; wanted one item a line")
    lines = []
    for number, line in enumerate(raw, 1):
        if not line.strip():
            raise LarosaError(f"{path}, line {number}: blank; remove the line")
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise LarosaError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
    return lines


def _shown(value: Any) -> str:
    """A value as it stands in an error: on one line, and short."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
