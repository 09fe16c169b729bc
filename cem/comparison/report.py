"""What a comparison found, as ``table.csv``, two pictures, ``report.md`` and ``report.html``."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import yaml

from cem.comparison.config import Comparison, command_of
from cem.comparison.correlation import correlate
from cem.comparison.definitions import CONTROLS, DEFINITIONS, SHOWN, TEXTS, meaning_of
from cem.comparison.findings import LIMITS, headlines
from cem.comparison.results import RunResult, write_table
from cem.comparison.statistics import Row, Spread, spread, summarize
from cem.report.document import NOTHING, Column, Link, Picture, Report, Section, Table
from cem.report.html import write_html
from cem.report.markdown import write_markdown
from cem.report.numbers import figure, signed, with_spread
from cem.report.reconstructions import Images, draw_reconstructions
from cem.report.tradeoff import Point, draw_tradeoff

MOST_NAMES = 6
"""Methods that the title names; more are counted."""


def write_report(comparison: Comparison, results: Sequence[RunResult]) -> Path:
    """Write ``table.csv``, ``tradeoff.png``, ``reconstructions.png``, ``report.md`` and ``report.html``.

    Pictures need at least one finished run.

    Args:
        comparison: its options; all files lie in ``comparison.out``.
        results: of all its runs, setting by setting.

    Returns:
        The path of ``report.html``.
    """
    out = comparison.out
    write_table(results, out / "table.csv")
    rows = summarize(results)
    sections = [
        _table_section(rows, results),
        _tradeoff_section(results, out),
        _reconstruction_section(results, out),
        _correlation_section(results),
        Section("How the figures are defined", [LIMITS], definitions=DEFINITIONS),
        _origin_section(comparison, results),
        _runs_section(results),
    ]
    report = Report(title(comparison), headlines(rows, results), sections)
    write_markdown(report, out / "report.md")
    write_html(report, out / "report.html")
    return out / "report.html"


def title(comparison: Comparison) -> str:
    """What is compared, on what, with how many seeds, in one line."""
    train, grid = comparison.train, comparison.grid
    seeds = "1 seed" if len(grid.seeds) == 1 else f"{len(grid.seeds)} seeds"
    names = ", ".join(grid.surrogates)
    what = names if len(grid.surrogates) <= MOST_NAMES else f"{len(grid.surrogates)} methods"
    return f"{what} on {train.data}: {train.arch}, {train.epochs} epochs, {seeds}"


def _table_section(rows: Sequence[Row], results: Sequence[RunResult]) -> Section:
    shown = [each for each in SHOWN if any(row.figures[each.name] for row in rows)]
    heads = [Column("setting"), Column("runs"), Column("converged"), *(each.head for each in shown)]
    lines: list[list[str | Link]] = []
    for row in rows:
        reference = row.setting.is_control
        figures = [
            NOTHING if reference and each.relative else _text(row.figures[each.name], each.factor, each.decimals)
            for each in shown
        ]
        converged = f"{row.converged} of {row.finished}" if row.finished else NOTHING
        lines.append([str(row.setting), _count(row), converged, *figures])
    for control, name in CONTROLS.items():
        errors = {
            f"{images}_mse": spread(result.figures[f"{control}_{images}_mse"] for result in results)
            for images in ("test", "train")
        }
        if any(errors.values()):
            figures = [figure(error.mean if (error := errors.get(each.name)) else None) for each in shown]
            lines.append([f"control: {name}", NOTHING, NOTHING, *figures])
    text = ["Mean ± standard deviation over seeds; table.csv has one line a run, in full precision."]
    text += [f"{result.run.name} failed: {result.reason}" for result in results if result.status == "failed"]
    return Section("Settings", text, Table(heads, lines), links=[Link("table.csv", Path("table.csv"))])


def _count(row: Row) -> str:
    if row.finished == row.planned:
        return str(row.finished)
    count = f"{row.finished} of {row.planned}" + (f", {row.failed} failed" if row.failed else "")
    return count.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")


def _tradeoff_section(results: Sequence[RunResult], out: Path) -> Section:
    section = Section("Trade-off")
    points = []
    for result in results:
        setting, mse, accuracy = result.run.setting, result.figures["test_mse"], result.figures["test_accuracy"]
        if mse is not None and accuracy is not None:
            points.append(Point(setting.method, setting.lambd, setting.noise_std, mse, accuracy))
    if not points:
        return section
    controls = {
        name: error.mean
        for control, name in CONTROLS.items()
        if (error := spread(result.figures[f"{control}_test_mse"] for result in results))
    }
    draw_tradeoff(points, controls, out / "tradeoff.png")
    section.picture = Picture(Path("tradeoff.png"), TEXTS["tradeoff"])
    return section


def _reconstruction_section(results: Sequence[RunResult], out: Path) -> Section:
    section = Section("Reconstructions")
    originals: Images | None = None
    rows: dict[str, tuple[Images, npt.NDArray[np.floating] | None]] = {}
    seeds = set()
    for result in results:
        path, name = result.attack_dir / "images.npz", str(result.run.setting).replace(", ", "\n")
        if result.status != "finished" or name in rows or not path.exists():
            continue
        try:
            with np.load(path) as content:
                own, guesses, ssim = (content[each] for each in ("originals", "reconstructions", "ssim"))
        except (OSError, EOFError, LookupError, ValueError, BadZipFile, zlib.error):
            section.paragraphs.append(f"{result.run.name} is left out: {path.name} cannot be read.")
            continue
        originals = own if originals is None else originals
        if not np.array_equal(originals, own):
            section.paragraphs.append(f"{result.run.name} is left out: it was attacked on other images.")
            continue
        rows[name] = (guesses, ssim if np.isfinite(ssim).all() else None)  # NaN where images are too small for one
        seeds.add(result.run.seed)
    if originals is None:
        return section
    draw_reconstructions(originals, rows, out / "reconstructions.png")
    section.picture = Picture(
        Path("reconstructions.png"), TEXTS["reconstructions"].format(seeds=", ".join(map(str, sorted(seeds))))
    )
    return section


def _correlation_section(results: Sequence[RunResult]) -> Section:
    lines: list[list[str | Link]] = []
    for each in correlate(results):
        scope = "all runs" if each.noise_std is None else f"σ {each.noise_std:g}"
        rho = NOTHING if each.rho is None else signed(each.rho)
        interval = NOTHING
        if each.low is not None and each.high is not None:
            interval = f"{signed(each.low)} to {signed(each.high)}"
        lines.append([each.value, scope, str(each.n), rho, interval, each.note or NOTHING])
    section = Section("Do the surrogates' values say what leaks?", list(TEXTS["correlation"]))
    if lines:
        heads = [Column("value of"), Column("runs", words=True), Column("n"), Column("ρ"), Column("95 % interval")]
        section.table = Table([*heads, Column("note", words=True)], lines)
        names = dict.fromkeys(name for result in results for name in result.values)
        section.facts = [(name, meaning_of(name)) for name in names]
    else:
        section.paragraphs.append("No attack has computed values yet.")
    return section


def _origin_section(comparison: Comparison, results: Sequence[RunResult]) -> Section:
    command = command_of(comparison.out / "compare.yaml")
    options = yaml.safe_dump(comparison.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=None)
    facts = [("Device", _distinct(result.summary.get("device") for result in results))]
    versions = [result.summary["versions"] for result in results if result.summary.get("versions")]
    names = dict.fromkeys(name for each in versions for name, version in each.items() if version is not None)
    used = (f"{name} {_distinct(each.get(name) for each in versions)}" for name in names)
    facts.append(("Versions", ", ".join(used) or NOTHING))
    sizes = [result.attack["sizes"] for result in results if result.attack.get("sizes")]
    for name in dict.fromkeys(name for each in sizes for name in each):
        facts.append((f"Images: {name.replace('_', ' ')}", _distinct(each.get(name) for each in sizes)))
    seconds = sum(result.figures[name] or 0 for result in results for name in ("train_seconds", "attack_seconds"))
    facts.append(("Time of all runs", f"{seconds / 60:.1f} min, {comparison.grid.jobs} at a time"))
    return Section(
        "Options and origin",
        [] if command is None else ["The command, and all options as it resolved them:"],
        facts=facts,
        code=(f"{command}\n\n" if command else "") + options,
    )


def _runs_section(results: Sequence[RunResult]) -> Section:
    heads = [Column("run"), Column("status", words=True), Column("accuracy [%]"), Column("MSE, unseen")]
    heads += [Column("SSIM, unseen"), Column("MSE, training")]
    heads += [Column("strongest attacker", words=True), Column("reason", words=True)]
    lines: list[list[str | Link]] = []
    for result in results:
        figures = result.figures
        lines.append(
            [
                Link(result.run.name, Path(result.run.name)) if result.run_dir.exists() else result.run.name,
                result.status,
                _percent(figures["test_accuracy"]),
                *(figure(figures[name]) for name in ("test_mse", "test_ssim", "train_mse")),
                result.attack.get("strongest") or NOTHING,
                result.reason or NOTHING,
            ]
        )
    return Section("Runs", table=Table(heads, lines))


def _distinct(values: Iterable[Any]) -> str:
    """All values that occur, once each."""
    return " / ".join(dict.fromkeys(str(value) for value in values if value is not None)) or NOTHING


def _text(spread: Spread | None, factor: float = 1.0, decimals: int | None = None) -> str:
    if spread is None:
        return NOTHING
    std = None if spread.std is None else spread.std * factor
    return with_spread(spread.mean * factor, std, decimals=decimals)


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else figure(100 * fraction, decimals=1)
