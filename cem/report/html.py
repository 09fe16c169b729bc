"""A report as one HTML file that needs nothing else: pictures and style are inside, there are no scripts."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from cem.files import write_text
from cem.report.document import NOTHING, SPREAD, Link, Noted, Report

_SYMBOL = re.compile("([λσ±]) ")  # and its number belong on one line


def write_html(report: Report, path: Path) -> None:
    """Write ``report`` to ``path``; a file that exists is complete.

    Links to other files are relative to its folder, and all that does not survive a move of the file alone.

    Raises:
        FileNotFoundError: a picture is not there.
    """
    environment = Environment(
        loader=PackageLoader("cem.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(SPREAD=SPREAD, NOTHING=NOTHING)
    environment.tests["link"] = lambda cell: isinstance(cell, Link)
    environment.tests["noted"] = lambda cell: isinstance(cell, Noted)
    environment.filters["tied"] = lambda text: _SYMBOL.sub("\\1\N{NO-BREAK SPACE}", text)
    environment.filters["address"] = lambda target: quote(target.as_posix())
    environment.filters["data_uri"] = lambda picture: _data_uri(path.parent / picture)
    write_text(path, environment.get_template("report.html.jinja").render(report=report))


def _data_uri(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
