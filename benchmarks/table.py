"""The table at the end of ``pytest benchmarks/``: a row a case and direction, in 140 columns or fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HEAD = f"{'case':43}{'':9}{'this library':>15}{'ms':>9}  {'strongest without':19}{'ms':>9}"
HEAD += f"{'times (quartiles)':>23}{'loop':>8}"
LEGEND = """\
ms: median of turns. times: how many times as long the strongest way without this library takes, with the quartiles of
neighboring turns; below 1 it is the quicker one. loop: the same of the loop over classes. All variants were checked
in that very case, outputs and gradients, against fp64 first."""


def quartiles_of(times: Mapping[str, float]) -> str:
    return f"{times['median']:.2f} ({times['q1']:.2f} to {times['q3']:.2f})"


def row_line(row: Mapping[str, Any]) -> str:
    own, strongest, spread = row["own"], row["strongest"], quartiles_of(row["times"])
    loop = f"{row['times_loop']['median']:.1f}" if "times_loop" in row else ""
    ms = {name: 1e3 * seconds for name, seconds in row["seconds"].items()}
    return (
        f"{row['case']:43}{row['direction']:9}{own:>15}{ms[own]:9.3f}  {strongest:19}{ms[strongest]:9.3f}"
        f"{spread:>23}{loop:>8}"
    ).rstrip()


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [HEAD, *map(row_line, rows), LEGEND]
