"""Which client, and what behind it, for which budget and which loss of accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from cem.comparison.statistics import Row
from cem.report.frontier import Priced


def priced(rows: Sequence[Row]) -> list[tuple[Row, Priced]]:
    """Rows with a finished run, with what they cost and buy; those that lack a figure are left out."""
    found = []
    for row in rows:
        costs, accuracy, mse = row.figures["client_multiply_adds"], row.accuracy, row.mse
        if row.finished and costs and accuracy and mse:
            setting = row.setting
            found.append((row, Priced(setting.method, str(setting.client), costs.mean, mse.mean, accuracy.mean)))
    return found


def frontier(settings: Sequence[tuple[Row, Priced]]) -> list[Row]:
    """Those that no other one beats: none computes no more, is as accurate and leaves attackers as large an error.

    Settings that are the same in all three do not beat each other. The order is that of the client's multiply-adds, and
    of one client that of falling accuracy.
    """
    merits = [(-each.multiply_adds, each.accuracy, each.mse) for _, each in settings]
    best = [
        (ours, row)
        for (row, _), ours in zip(settings, merits, strict=True)
        if not any(other != ours and all(map(float.__ge__, other, ours)) for other in merits)
    ]
    return [row for _, row in sorted(best, key=lambda each: each[0], reverse=True)]
