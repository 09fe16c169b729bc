"""A report as plain content, from which the HTML and the Markdown file are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SPREAD = " ± "
"""Between a mean and its spread in the text of a cell."""
NOTHING = "–"
"""Text of a cell without a figure."""


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file beside the report.

    Attributes:
        text: what is shown.
        target: relative to the report's folder.
    """

    text: str
    target: Path


@dataclass(frozen=True)
class Noted:
    """A cell with something smaller below it.

    Attributes:
        text: what is shown.
        note: what it should be read with.
    """

    text: str
    note: str


Cell = str | Link | Noted


@dataclass(frozen=True)
class Column:
    """Head of a column, such as ``MSE`` in the group ``attack, unseen``.

    Attributes:
        title: what is in the column.
        group: what it has in common with its neighbors, or empty.
        words: whether the column holds text rather than figures.
    """

    title: str
    group: str = ""
    words: bool = False

    @property
    def full(self) -> str:
        """Title and group in one."""
        return f"{self.group}: {self.title}" if self.group else self.title


@dataclass(frozen=True)
class Table:
    """Rows of text; every row has a cell for every column, and the first one names the row."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def groups(self) -> list[tuple[str, int]]:
        """Groups of neighboring columns and how many columns each has."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and column.group and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report, and what it shows."""

    path: Path
    description: str


@dataclass
class Section:
    """One part of a report, in this order: text, table, picture, definitions, facts, links, code.

    Attributes:
        title: its heading.
        paragraphs: plain text.
        table: or ``None``.
        picture: or ``None``.
        definitions: terms and what they mean, in sentences.
        facts: names and short values.
        links: files beside the report.
        code: verbatim text, or empty.
        folded: whether the HTML file shows it only when asked to.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    table: Table | None = None
    picture: Picture | None = None
    definitions: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    code: str = ""
    folded: bool = False


@dataclass
class Report:
    """A whole report, in this order.

    Attributes:
        title: what it is about.
        lead: what it found, in one sentence.
        picture: that shows it, or ``None``.
        headlines: further sentences.
        sections: the rest.
    """

    title: str
    lead: str
    picture: Picture | None
    headlines: list[str]
    sections: list[Section]
