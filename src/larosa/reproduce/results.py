"""What an experiment hands back: tables, pictures and notes, and how tables become text."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import asdict, dataclass, field
from typing import Any

#: A number, a word ("not reachable"), or None for a cell that has no meaning.
Cell = float | int | str | None

#: Stands for None in Markdown and HTML.
_EMPTY = "–"  # noqa: RUF001 - an en dash is meant


@dataclass(frozen=True)
class Column:
    """A table column: its heading and the format of its numbers, as `format` takes it."""

    name: str
    format: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; CSV and JSON keep its numbers in full, Markdown and HTML show them rounded."""

    name: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.name}: ragged rows"

    def markdown(self) -> str:
        """The table as Markdown, under its title."""
        head = " | ".join(column.name for column in self.columns)
        rule = " | ".join("---" if not column.format else "---:" for column in self.columns)
        rows = [" | ".join(self._text(cell, column) for cell, column in self._pairs(row)) for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in (head, rule, *rows))]) + "\n"

    def html(self) -> str:
        """The table as an HTML table with its title as caption."""
        head = "".join(
            f"<th{' class=number' if column.format else ''}>{html.escape(column.name)}</th>" for column in self.columns
        )
        rows = []
        for row in self.rows:
            cells = "".join(
                f"<td{' class=number' if column.format else ''}>{html.escape(self._text(cell, column))}</td>"
                for cell, column in self._pairs(row)
            )
            rows.append(f"<tr>{cells}</tr>")
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return (
            f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
            "</table></div>"
        )

    def csv(self) -> str:
        """The table as CSV with unrounded numbers; empty where a cell has no meaning."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def _pairs(self, row: list[Cell]) -> list[tuple[Cell, Column]]:
        return list(zip(row, self.columns, strict=True))

    def _text(self, cell: Cell, column: Column) -> str:
        if cell is None:
            return _EMPTY
        return cell if isinstance(cell, str) else format(cell, column.format)


@dataclass(frozen=True)
class Picture:
    """A finished PNG; `caption` says what is to be seen."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Results:
    """Everything an experiment found. `notes` are sentences that belong under the tables."""

    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
