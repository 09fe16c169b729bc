"""Reports as HTML and Markdown, figures as text, the trade-off plot."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from cem.report import tradeoff
from cem.report.document import NOTHING, Column, Link, Picture, Report, Section, Table
from cem.report.figure import new_figure, save_figure
from cem.report.html import write_html
from cem.report.markdown import escape, write_markdown
from cem.report.numbers import figure, signed, with_spread
from cem.report.tradeoff import Point, draw_tradeoff

NASTY = "<script>alert('a & b')</script> | `x` *y* \\ [z](http://example.org)"


class Page(HTMLParser):
    """Tags with their attributes, and text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def report(tmp_path: Path) -> Report:
    blank = new_figure(1, 1)
    save_figure(blank, tmp_path / "picture.png")
    columns = [Column("setting"), Column("MSE", "attack, unseen"), Column("SSIM", "attack, unseen"), Column("note")]
    table = Table(columns, [[Link("a run", Path("runs/a b#1")), "0.031 ± 0.002", NOTHING, NASTY]])
    section = Section(
        f"Title {NASTY}",
        [NASTY],
        table,
        Picture(Path("picture.png"), f"Picture {NASTY}"),
        definitions=[(NASTY, NASTY)],
        facts=[(NASTY, NASTY)],
        links=[Link("file", Path("runs/a.json"))],
        code=f"command '{NASTY}' ```",
    )
    return Report(f"Report {NASTY}", [NASTY], [section])


@pytest.fixture
def page(report: Report, tmp_path: Path) -> Page:
    write_html(report, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_html_is_well_formed(page: Page) -> None:
    assert page.open == []


def test_html_needs_no_other_file_and_no_network(page: Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert len(sources) == 1
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in sources)
    for _, attributes in page.tags:
        assert not re.match(r"(https?:)?//", attributes.get("href") or "")


def test_html_style_loads_nothing(report: Report, tmp_path: Path) -> None:
    write_html(report, tmp_path / "report.html")
    style = re.findall(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_html_shows_text_as_it_is(page: Page) -> None:
    # Title twice, headline, heading, paragraph, cell, caption, two pairs, code.
    assert page.text.count(NASTY) == 12


def test_html_picture_is_described_for_those_who_cannot_see_it(page: Page) -> None:
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [f"Picture {NASTY}"]


def test_html_links_are_relative_and_quoted(page: Page) -> None:
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["runs/a%20b%231", "runs/a.json"]


def test_html_groups_columns(page: Page) -> None:
    spans = [attributes["colspan"] for tag, attributes in page.tags if tag == "th" and "colspan" in attributes]
    assert spans == ["1", "2", "1"]


def test_html_cell_names_its_column_for_narrow_screens(page: Page) -> None:
    names = [attributes["data-column"] for tag, attributes in page.tags if tag == "td"]
    assert names == ["attack, unseen: MSE", "attack, unseen: SSIM", "note"]


def test_html_of_a_picture_that_is_missing_is_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "picture.png").unlink()
    with pytest.raises(FileNotFoundError):
        write_html(report, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def cells(line: str) -> list[str]:
    """Cells of a line of a Markdown table."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return re.split(r"(?<!\\) \| ", line[2:-2])


def test_markdown_table_has_a_cell_for_every_column(report: Report, tmp_path: Path) -> None:
    write_markdown(report, tmp_path / "report.md")
    lines = [line for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, rule, row = map(cells, lines)
    assert head == ["setting", "attack, unseen: MSE", "attack, unseen: SSIM", "note"]
    assert rule == ["---", "---:", "---:", "---:"]
    assert row[:3] == ["[a run](runs/a%20b%231)", "0.031 ± 0.002", NOTHING]
    assert len(row) == 4


def test_markdown_marks_up_nothing_that_is_text() -> None:
    assert escape("a | b <i> *c* `d` [e](f) \\ _g_ snake_case") == (
        r"a \| b \<i\> \*c\* \`d\` \[e\](f) \\ \_g\_ snake_case"
    )


def test_markdown_text_stays_on_its_line() -> None:
    assert escape("a\n\n# b") == "a # b"


def test_markdown_has_what_the_html_has(report: Report, tmp_path: Path) -> None:
    write_markdown(report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    # Title, headline, heading, paragraph, cell, picture, two pairs; the code is verbatim.
    assert text.count(escape(NASTY)) == 10
    assert f"````\ncommand '{NASTY}' ```\n````" in text
    assert "](picture.png)" in text
    assert "[file](runs/a.json)" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (0.0, "0"),
        (0.03126, "0.0313"),
        (0.03, "0.0300"),
        (-12.34, "−12.3"),
        (512.6, "513"),
        (12345.0, "12345"),
        (2e-7, "2.0e−7"),
        (-3.14e9, "−3.1e9"),
    ],
)
def test_figure_has_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("value", "text"), [(86.849, "86.8"), (-0.04, "0.0"), (-0.06, "−0.1"), (2e-7, "0.0")])
def test_figure_of_fixed_decimals(value: float, text: str) -> None:
    assert figure(value, decimals=1) == text


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.0312, None, "0.0312"),
        (0.0312, 0.0011, "0.0312 ± 0.0011"),
        (0.0312, 0.00002, "0.03120 ± 0.00002"),
        (512.0, 3.2, "512 ± 3"),
        (700.0, 0.0, "700 ± 0"),
        (3.4e7, 2.8e6, "3.4e7 ± 2.8e6"),
    ],
)
def test_spread_is_shown_to_the_place_of_the_mean_or_finer(mean: float, std: float | None, text: str) -> None:
    assert with_spread(mean, std) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "+0.50"), (-0.5, "−0.50"), (0.001, "0.00"), (-0.001, "0.00")])
def test_signed_figure(value: float, text: str) -> None:
    assert signed(value) == text


def point(method: str = "mixture", lambd: float = 16.0, noise_std: float = 0.1, mse: float = 0.03) -> Point:
    return Point(method, lambd, noise_std, mse, 0.9)


@pytest.mark.parametrize(
    "points",
    [
        [point()],
        [point("none", 0.0), point(), point("attention")],
        [point(noise_std=noise, lambd=lambd) for noise in (0.1, 0.2) for lambd in (4.0, 16.0)],
        [point(noise_std=0.1 * index) for index in range(1, 10)],
    ],
    ids=["one run", "one noise", "grid", "more noises than markers"],
)
def test_tradeoff_is_drawn(tmp_path: Path, points: list[Point]) -> None:
    draw_tradeoff(points, {"mean image": 0.09, "class mean": 0.05}, tmp_path / "tradeoff.png")
    assert matplotlib.image.imread(tmp_path / "tradeoff.png").std() > 0.01


def test_tradeoff_shows_the_controls(tmp_path: Path) -> None:
    draw_tradeoff([point()], {}, tmp_path / "without.png")
    draw_tradeoff([point()], {"mean image": 0.09}, tmp_path / "with.png")
    without, drawn = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("without", "with"))
    assert not np.array_equal(without, drawn)


@pytest.mark.parametrize(("methods", "numbers"), [(7, set()), (8, {"1", "2", "3", "4", "5", "6", "7", "8"})])
def test_tradeoff_numbers_methods_that_colors_cannot_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: int, numbers: set[str]
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(tradeoff, "save_figure", lambda figure, path: figures.append(figure))
    points = [replace(point(), method=f"s{index}") for index in range(methods)]
    draw_tradeoff(points, {}, tmp_path / "tradeoff.png")
    (axes,) = figures[0].axes
    assert {text.get_text().strip() for text in axes.texts} - {""} == numbers
    labels = [text.get_text() for legend in figures[0].legends for text in legend.get_texts()]
    assert ("8 s7 λ 16" in labels) == bool(numbers)


def test_tradeoff_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs"):
        draw_tradeoff([], {}, tmp_path / "tradeoff.png")
