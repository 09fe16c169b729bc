"""Figures as text: as many digits as they are worth."""

from __future__ import annotations

import math

from cem.report.document import NOTHING, SPREAD

_MINUS = "−"


def figure(value: float | None, *, decimals: int | None = None) -> str:
    """A number to three digits, or to a fixed number of decimals; a dash for ``None``."""
    if value is None:
        return NOTHING
    if decimals is None and _is_extreme(value):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    text = f"{value:.{_places(value, 3) if decimals is None else decimals}f}"
    # What rounds to nothing has no sign.
    return text.replace("-", _MINUS if float(text) != 0 else "")


def with_spread(mean: float, std: float | None, *, decimals: int | None = None) -> str:
    """``"0.0312 ± 0.0011"``: the mean to three digits or as far as one of the spread's, both to the same place."""
    if std is None:
        return figure(mean, decimals=decimals)
    if decimals is None and not _is_extreme(mean):
        decimals = max(_places(mean, 3), _places(std, 1))
    return f"{figure(mean, decimals=decimals)}{SPREAD}{figure(std, decimals=decimals)}"


def signed(value: float, *, decimals: int = 2) -> str:
    """A number that shows its sign: ``"+0.42"``, ``"−0.87"``."""
    text = figure(value, decimals=decimals)
    return "+" + text if float(text.replace(_MINUS, "-")) > 0 else text


def _is_extreme(value: float) -> bool:
    """Whether the number takes too many digits to be written out."""
    return value != 0 and not 1e-5 <= abs(value) < 1e5


def _places(value: float, digits: int) -> int:
    """Decimals that show ``value`` to this many digits; at most 6."""
    return 0 if value == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
