"""What a comparison found, as ``table.csv``, two pictures, ``report.md`` and ``report.html``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cem.comparison.config import Comparison, command_of
from cem.comparison.correlation import correlate
from cem.comparison.definitions import (
    ACCURACY,
    BLIND,
    DEFINITIONS,
    EPOCH,
    INFORMATION,
    KNOWLEDGE,
    MAIN,
    MORE,
    MULTIPLY_ADDS,
    SENT,
    TEXTS,
    Shown,
    attacked,
    meaning_of,
    of_attack,
)
from cem.comparison.findings import LIMITS, headlines, interval, lead, shown_settings
from cem.comparison.frontier import frontier, priced
from cem.comparison.gain import MOST_POINTS, Fit, fit_levels, is_payable
from cem.comparison.pictures import draw_pictures
from cem.comparison.results import RunResult, mapping, write_table
from cem.comparison.statistics import Row, Spread, spread, summarize
from cem.report.document import NOTHING, Cell, Column, Link, Noted, Picture, Report, Section, Table
from cem.report.frontier import draw_frontier
from cem.report.html import write_html
from cem.report.markdown import write_markdown
from cem.report.numbers import figure, signed, with_spread
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
    rows, fits = summarize(results), fit_levels(results)
    sections = [
        _main_section(rows, results, fits),
        *(_knowledge_section(rows, each) for each in comparison.attack.knowledge[1:]),
        _tradeoff_section(results, out),
        *([_frontier_section(rows, out)] if _varies(rows) else []),
        _gain_section(rows, fits),
        _attacks_section(rows, results),
        _more_section(rows),
        _information_section(rows),
        _correlation_section(results),
        Section("How the figures are defined", [LIMITS], definitions=DEFINITIONS, folded=True),
        _origin_section(comparison, results),
        _runs_section(results),
    ]
    picture = draw_pictures(shown_settings(rows), results, out)
    report = Report(title(comparison), lead(rows), picture, headlines(rows, results, fits), sections)
    write_markdown(report, out / "report.md")
    write_html(report, out / "report.html")
    return out / "report.html"


def title(comparison: Comparison) -> str:
    """What is compared, on what, with how many seeds, and what attackers know, in one line."""
    train, grid = comparison.train, comparison.grid
    seeds = "1 seed" if len(grid.seeds) == 1 else f"{len(grid.seeds)} seeds"
    names = ", ".join(grid.surrogates)
    what = names if len(grid.surrogates) <= MOST_NAMES else f"{len(grid.surrogates)} methods"
    knowledge = ", and ".join(KNOWLEDGE[each] for each in comparison.attack.knowledge)
    clients = len({setting.client for setting in grid.settings()})
    behind = f", {clients} clients" if clients > 1 else ""
    return f"{what} on {train.data}: {train.arch}{behind}, {train.epochs} epochs, {seeds}; {knowledge}"


def _main_section(rows: Sequence[Row], results: Sequence[RunResult], fits: Mapping[str, Fit]) -> Section:
    over, cost = _comparator(rows), MULTIPLY_ADDS if _varies(rows) else EPOCH
    gain = Column(f"over {over} [×]", "gain at equal accuracy")
    heads = [Column("setting"), *(each.head for each in MAIN), gain, cost.head]
    lines: list[list[Cell]] = [
        [_name(row), *_figures(row, MAIN), _gain(row, over, fits), *_figures(row, [cost])] for row in rows
    ]
    for name in BLIND:
        errors = [
            spread(result.figures.get(each.name.replace("worst_", f"{name}.")) for result in results)
            for each in attacked("worst_")
        ]
        if any(errors):
            means = (error and Spread(error.mean, None, 1) for error in errors)  # the same for all runs of one data set
            texts = map(_text, means, attacked("worst_"))
            lines.append([f"control: {name.replace('_', ' ')}", NOTHING, *texts, NOTHING, NOTHING])
    text = ["Mean ± standard deviation over seeds; table.csv has one line a run, in full precision."]
    text += [f"{result.run.name} failed: {result.reason}" for result in results if result.status == "failed"]
    return Section("Settings", text, Table(heads, lines), links=[Link("table.csv", Path("table.csv"))])


def _knowledge_section(rows: Sequence[Row], knowledge: str) -> Section:
    shown = attacked(f"{knowledge}:worst_", "worst attack")
    return Section(f"Settings: {KNOWLEDGE[knowledge]}", table=_settings_table(rows, (ACCURACY, *shown)))


def _tradeoff_section(results: Sequence[RunResult], out: Path) -> Section:
    section = Section("Trade-off")
    points, several = [], len({result.run.setting.client for result in results}) > 1
    for result in results:
        setting, mse, accuracy = result.run.setting, result.figures["worst_mse"], result.figures["test_accuracy"]
        if result.status == "finished" and mse is not None and accuracy is not None:
            client = str(setting.client) if several else ""
            points.append(Point(setting.method, setting.lambd, setting.noise_std, mse, accuracy, client))
    if not points:
        return section
    controls = {
        name.replace("_", " "): error.mean
        for name in BLIND
        if (error := spread(result.figures.get(f"{name}.mse") for result in results))
    }
    draw_tradeoff(points, controls, out / "tradeoff.png")
    section.picture = Picture(Path("tradeoff.png"), TEXTS["tradeoff"])
    return section


def _varies(rows: Sequence[Row]) -> bool:
    """Whether there is more than one client."""
    return len({row.setting.client for row in rows}) > 1


def _frontier_section(rows: Sequence[Row], out: Path) -> Section:
    section = Section("Where to cut")
    if not (settings := priced(rows)):
        return section
    section.paragraphs = list(TEXTS["frontier"])
    section.table = _settings_table(frontier(settings), (MULTIPLY_ADDS, SENT, *MAIN))
    drawn = [each for _, each in settings]
    draw_frontier(drawn, max(each.accuracy for each in drawn) - MOST_POINTS / 100, out / "frontier.png")
    section.picture = Picture(Path("frontier.png"), TEXTS["frontier_picture"])
    return section


def _gain_section(rows: Sequence[Row], fits: Mapping[str, Fit]) -> Section:
    section = Section("Gain at equal accuracy", [TEXTS["gain"]], folded=True)
    methods = list(dict.fromkeys(row.setting.method for row in rows))
    lines: list[list[Cell]] = []
    for level, fit in fits.items():
        for index, method in enumerate(methods):
            for over in methods[:index]:
                gain = fit.gain(method, over)
                lines.append(
                    [
                        *(f"{method} over {over}", level, figure(gain.factor, decimals=2)),
                        *(NOTHING if gain.low is None else interval(gain), str(gain.df), gain.called or NOTHING),
                        gain.note or NOTHING,
                    ]
                )
        slope = "cannot be told" if fit.slope is None else f"{signed(fit.slope, decimals=3)} a point"
        scatter = NOTHING if fit.scatter is None else f"{figure(100 * fit.scatter, decimals=1)} %"
        counted = f"{len(fit.counted)} of {fit.runs} runs have lost 0 to {MOST_POINTS:g} points"
        section.facts.append((level, f"{counted}; b {slope}; scatter of a single run {scatter}"))
    heads = [
        Column("method"),
        Column("at", words=True),
        Column("gain [×]"),
        Column("95 % interval"),
        Column("degrees of freedom"),
    ]
    if lines:
        section.table = Table([*heads, Column("called", words=True), Column("note", words=True)], lines)
    else:
        section.paragraphs.append("No run of two methods at the same noise, client and seed is finished.")
    return section


def _attacks_section(rows: Sequence[Row], results: Sequence[RunResult]) -> Section:
    columns, lines = of_attack(""), list[list[Cell]]()
    for row in rows:
        runs = [result for result in results if result.run.setting == row.setting]
        attacks = dict.fromkeys(name for result in runs for name in result.attacks)
        controls = dict.fromkeys(name for result in runs for name in result.controls if name not in BLIND)
        for name in [*attacks, *controls]:
            label = name if name in attacks else f"control: {name.replace('_', ' ')}"
            lines.append([f"{row.setting}: {label}", *_figures(row, of_attack(name))])
    section = Section("Every attack, on unseen images", folded=True)
    if lines:
        section.table = Table([Column("setting and attack"), *(each.head for each in columns)], lines)
    return section


def _more_section(rows: Sequence[Row]) -> Section:
    lines: list[list[Cell]] = []
    shown = _there(rows, MORE)
    for row in rows:
        converged = f"{row.converged} of {row.finished}" if row.finished else NOTHING
        lines.append([str(row.setting), _count(row), converged, *_figures(row, shown)])
    heads = [Column("setting"), Column("runs"), Column("converged"), *(each.head for each in shown)]
    return Section("More figures of every setting", table=Table(heads, lines), folded=True)


def _information_section(rows: Sequence[Row]) -> Section:
    section = Section("What features tell, estimated without an attack", list(TEXTS["information"]), folded=True)
    section.table = _settings_table(rows, INFORMATION)
    return section


def _settings_table(rows: Sequence[Row], columns: Sequence[Shown]) -> Table:
    shown = _there(rows, columns)
    lines: list[list[Cell]] = [[str(row.setting), *_figures(row, shown)] for row in rows]
    return Table([Column("setting"), *(each.head for each in shown)], lines)


def _there(rows: Sequence[Row], columns: Sequence[Shown]) -> list[Shown]:
    """Columns that have any figure."""
    return [each for each in columns if any(row.figures.get(each.name) for row in rows)]


def _figures(row: Row, columns: Sequence[Shown]) -> list[str]:
    return [
        NOTHING if each.relative and row.setting.is_control else _text(row.figures.get(each.name), each)
        for each in columns
    ]


def _comparator(rows: Sequence[Row]) -> str:
    """What gains in the table are over: the first method with a penalty, if there are others, else the first one."""
    methods = list(dict.fromkeys(row.setting.method for row in rows))
    penalized = list(dict.fromkeys(row.setting.method for row in rows if not row.setting.is_control))
    return penalized[0] if len(penalized) > 1 else methods[0]


def _gain(row: Row, over: str, fits: Mapping[str, Fit]) -> Cell:
    setting = row.setting
    fit = fits.get(setting.level)
    if fit is None or setting.method == over or not row.points_lost or not is_payable(row.points_lost.mean):
        return NOTHING  # nobody would pay that, and the runs do not count
    gain = fit.gain(setting.method, over)
    if gain.factor is None:
        return NOTHING
    return Noted(f"{gain.factor:.2f}", "; ".join(filter(None, (interval(gain), "" if gain.is_claim else "direction"))))


def _name(row: Row) -> Cell:
    return str(row.setting) if row.finished == row.planned else Noted(str(row.setting), _count(row))


def _count(row: Row) -> str:
    if row.finished == row.planned:
        return str(row.finished)
    return f"{row.finished} of {row.planned} runs" + (f", {row.failed} failed" if row.failed else "")


def _correlation_section(results: Sequence[RunResult]) -> Section:
    lines: list[list[Cell]] = []
    for each in correlate(results):
        rho = NOTHING if each.rho is None else signed(each.rho)
        interval = NOTHING
        if each.low is not None and each.high is not None:
            interval = f"{signed(each.low)} to {signed(each.high)}"
        lines.append([each.value, each.level or "all runs", str(each.n), rho, interval, each.note or NOTHING])
    section = Section("Do the surrogates' values say what leaks?", list(TEXTS["correlation"]), folded=True)
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
    versions = [mapping(result.summary, "versions") for result in results]
    names = dict.fromkeys(name for each in versions for name, version in each.items() if version is not None)
    used = (f"{name} {_distinct(each.get(name) for each in versions)}" for name in names)
    facts.append(("Versions", ", ".join(used) or NOTHING))
    sizes = [mapping(result.attack, "sizes") for result in results]
    for name in dict.fromkeys(name for each in sizes for name in each):
        facts.append((f"Images: {name.replace('_', ' ')}", _distinct(each.get(name) for each in sizes)))
    seconds = sum(result.figures[name] or 0 for result in results for name in ("train_seconds", "attack_seconds"))
    facts.append(("Time of all runs", f"{seconds / 60:.1f} min, {comparison.grid.jobs} at a time"))
    return Section(
        "Options and origin",
        [] if command is None else ["The command, and all options as it resolved them:"],
        facts=facts,
        folded=True,
        code=(f"{command}\n\n" if command else "") + options,
    )


def _runs_section(results: Sequence[RunResult]) -> Section:
    heads = [Column("run"), Column("status", words=True), Column("accuracy [%]"), Column("MSE"), Column("SSIM")]
    heads += [Column("identified [%]"), Column("worst attack", words=True), Column("reason", words=True)]
    lines: list[list[Cell]] = []
    for result in results:
        figures = result.figures
        lines.append(
            [
                Link(result.run.name, Path(result.run.name)) if result.run_dir.exists() else result.run.name,
                result.status,
                *(_text(spread([figures[each.name]]), each) for each in MAIN),
                result.worst or NOTHING,
                result.reason or NOTHING,
            ]
        )
    return Section("Runs", table=Table(heads, lines), folded=True)


def _distinct(values: Iterable[Any]) -> str:
    """All values that occur, once each."""
    return " / ".join(dict.fromkeys(str(value) for value in values if value is not None)) or NOTHING


def _text(spread: Spread | None, shown: Shown) -> str:
    if spread is None:
        return NOTHING
    std = None if spread.std is None else spread.std * shown.factor
    return with_spread(spread.mean * shown.factor, std, decimals=shown.decimals)
