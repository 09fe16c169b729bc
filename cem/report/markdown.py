"""A report as GitHub-flavored Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from cem.files import write_text
from cem.report.document import Cell, Link, Noted, Picture, Report, Section, Table

# An underscore inside a word marks nothing.
_MARKUP = re.compile(r"[\\`*<>\[\]|~]|(?<![^\W_])_|_(?![^\W_])|^[#+>-]")


def write_markdown(report: Report, path: Path) -> None:
    """Write ``report`` to ``path``; pictures and links are relative to its folder. A file that exists is complete."""
    lines = [f"# {escape(report.title)}", "", escape(report.lead), ""]
    if report.picture is not None:
        lines += [_picture(report.picture), ""]
    lines += [f"- {escape(line)}" for line in report.headlines]
    for section in report.sections:
        lines += ["", *_section(section)]
    write_text(path, "\n".join(lines) + "\n")


def escape(text: str) -> str:
    """``text`` such that Markdown shows it as it is, on one line."""
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def _section(section: Section) -> Iterable[str]:
    yield f"## {escape(section.title)}"
    for paragraph in section.paragraphs:
        yield from ("", escape(paragraph))
    if section.table is not None:
        yield from ("", *_table(section.table))
    if section.picture is not None:
        yield from ("", _picture(section.picture))
    for pairs in (section.definitions, section.facts):
        if pairs:
            yield ""
        yield from (f"- **{escape(term)}**: {escape(meaning)}" for term, meaning in pairs)
    if section.links:
        yield from ("", " · ".join(map(_link, section.links)))
    if section.code:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", section.code)), default=0))
        yield from ("", fence, section.code.rstrip("\n"), fence)


def _table(table: Table) -> Iterable[str]:
    yield _row(escape(column.full) for column in table.columns)
    yield _row("---" if index == 0 or column.words else "---:" for index, column in enumerate(table.columns))
    for row in table.rows:
        yield _row(map(_cell, row))


def _cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return _link(cell)
    return escape(f"{cell.text} ({cell.note})" if isinstance(cell, Noted) else cell)


def _picture(picture: Picture) -> str:
    return f"![{escape(picture.description)}]({quote(picture.path.as_posix())})"


def _link(link: Link) -> str:
    return f"[{escape(link.text)}]({quote(link.target.as_posix())})"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
