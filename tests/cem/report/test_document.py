"""Reports as HTML and Markdown, and figures as text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cem.report.document import NOTHING, Column, Link, Noted, Picture, Report, Section, Table
from cem.report.figure import new_figure, save_figure
from cem.report.html import write_html
from cem.report.markdown import escape, write_markdown
from cem.report.numbers import figure, signed, with_spread

NASTY = "<script>alert('a & b')</script> | `x` *y* \\ [z](http://example.org)"


class Page(HTMLParser):
    """Tags with their attributes, text, and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.style, self.open = [], "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text += data


@pytest.fixture
def report(tmp_path):
    save_figure(new_figure(1, 1), tmp_path / "picture.png")
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
    folded = Section("Folded", table=Table(columns[:2], [["a", Noted("1.5", NASTY)]]), folded=True)
    return Report(f"Report {NASTY}", f"Lead {NASTY}", section.picture, [NASTY], [section, folded])


@pytest.fixture
def page(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_html_needs_no_other_file_and_no_network(page):
    assert page.open == []  # well-formed
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert len(sources) == 2
    assert all(each.startswith("data:image/png;base64,") for each in sources)
    assert not any(re.match(r"(https?:)?//", attributes.get("href") or "") for _, attributes in page.tags)
    assert "font" in page.style
    assert not re.search(r"url\(|@import", page.style)


def test_html_shows_text_as_it_is(page):
    # Title twice, lead, picture, headline, heading, paragraph, cell, caption, two pairs, code, note.
    assert page.text.count(NASTY) == 15


def test_html_begins_with_lead_and_picture_and_folds_what_it_is_told_to(page):
    tags = [tag for tag, _ in page.tags]
    assert tags.index("p") < tags.index("img") < tags.index("ul") < tags.index("table")
    assert tags.count("details") == 1
    assert "Folded" in page.text[page.text.rindex("command") :]


@pytest.mark.parametrize(
    ("tag", "name", "values"),
    [
        ("img", "alt", [f"Picture {NASTY}"] * 2),  # for those who cannot see it
        ("a", "href", ["runs/a%20b%231", "runs/a.json"]),  # relative and quoted
        ("th", "colspan", ["1", "2", "1", "1", "1"]),  # columns are grouped
        (
            "td",
            "data-column",
            ["attack, unseen: MSE", "attack, unseen: SSIM", "note", "attack, unseen: MSE"],
        ),  # for narrow screens
    ],
)
def test_html_describes_pictures_quotes_links_groups_columns_and_names_the_column_of_a_cell(page, tag, name, values):
    assert [attributes[name] for each, attributes in page.tags if each == tag and name in attributes] == values


def test_html_of_a_picture_that_is_missing_is_refused(report, tmp_path):
    (tmp_path / "picture.png").unlink()
    with pytest.raises(FileNotFoundError):
        write_html(report, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def markdown(report, tmp_path):
    write_markdown(report, tmp_path / "report.md")
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def test_markdown_table_has_a_cell_for_every_column(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    head, rule, row, *_, noted = (re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines)
    assert head == ["setting", "attack, unseen: MSE", "attack, unseen: SSIM", "note"]
    assert rule == ["---", "---:", "---:", "---:"]
    assert row[:3] == ["[a run](runs/a%20b%231)", "0.031 ± 0.002", NOTHING]
    assert len(row) == 4
    assert noted == ["a", f"1.5 ({escape(NASTY)})"]


def test_markdown_marks_up_nothing_that_is_text_and_keeps_it_on_its_line():
    text = "a | b <i> *c* `d` [e](f) \\ _g_ snake_case\n\n# b"
    assert escape(text) == r"a \| b \<i\> \*c\* \`d\` \[e\](f) \\ \_g\_ snake_case # b"


def test_markdown_has_what_the_html_has(markdown):
    # Title, lead, picture, headline, heading, paragraph, cell, picture, two pairs, note; the code is verbatim.
    assert markdown.count(escape(NASTY)) == 13
    assert f"````\ncommand '{NASTY}' ```\n````" in markdown
    assert "](picture.png)" in markdown
    assert "[file](runs/a.json)" in markdown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (0.0, "0"),
        (0.03126, "0.0313"),
        (0.03, "0.0300"),
        (-12.34, "−12.3"),
        (12345.0, "12345"),
        (2e-7, "2.0e−7"),
        (-3.14e9, "−3.1e9"),
        ((86.849, 1), "86.8"),
        ((-0.04, 1), "0.0"),
        ((-0.06, 1), "−0.1"),
    ],
    ids=str,
)
def test_figure_has_three_digits_or_fixed_decimals(value, text):
    value, decimals = value if isinstance(value, tuple) else (value, None)
    assert figure(value, decimals=decimals) == text


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
def test_spread_is_shown_to_the_place_of_the_mean_or_finer(mean, std, text):
    assert with_spread(mean, std) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "+0.50"), (-0.5, "−0.50"), (0.001, "0.00"), (-0.001, "0.00")])
def test_signed_figure(value, text):
    assert signed(value) == text
