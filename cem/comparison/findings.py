"""What a comparison found, in sentences that follow from its figures alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cem.comparison.gain import LEAST_DF, Fit, Gain, is_payable
from cem.comparison.results import RunResult
from cem.comparison.statistics import Row, Spread
from cem.report.numbers import figure, with_spread
from cem.surrogates import CONTROL

LIMITS = (
    "An attack shows that at least so much leaks: the figures are lower bounds on leakage, because a stronger "
    "attack than those tried may exist. Nothing here is a certificate of privacy."
)

MOST_METHODS = 8
"""Methods that get a sentence of their own; the others are in the table."""


def shown_settings(rows: Sequence[Row]) -> list[Row]:
    """The settings that stand for all: a control, and what defends best beside it; either may be missing.

    That is the setting on which the worst attack errs most, relative to the control at its level, among those that lose
    no more than 2 points of accuracy; where all lose more, the one that loses least.
    """
    scored = [row for row in rows if row.mse]
    controls = {row.setting.level: row for row in scored if row.setting.is_control}
    defended = [row for row in scored if not row.setting.is_control]
    paid = [(row, ratio, lost) for row in defended if (ratio := row.figures["mse_ratio"]) if (lost := row.points_lost)]
    fair = [(row, ratio.mean) for row, ratio, lost in paid if is_payable(lost.mean)]
    if not fair:
        fair = [(row, -lost.mean) for row, _, lost in paid]
    if not fair:
        fair = [(row, row.mse.mean) for row in defended or controls.values() if row.mse]
    best = max(fair, key=lambda each: each[1], default=(None,))[0]
    if best is None:
        return []
    control = controls.get(best.setting.level)
    return [best] if control in (None, best) else [control, best]


def lead(rows: Sequence[Row]) -> str:
    """The main finding in one sentence."""
    if not (shown := shown_settings(rows)):
        return "No run is finished yet."
    *control, best = shown
    text = f"On {best.setting} the worst attack has "
    if control and (ratio := best.figures["mse_ratio"]):
        times = with_spread(ratio.mean, ratio.std, decimals=2)
        text += f"{times} times the error that it has on {control[0].setting}: "
    text += f"MSE {_pair('worst_mse', shown)}"
    if best.figures["worst_ssim"]:
        text += f", SSIM {_pair('worst_ssim', shown, decimals=2)}"
    if best.figures["worst_identified"]:
        chance = best.figures["chance"]
        text += f", {_pair('worst_identified', shown, 100.0, 0)} % of images identified"
        text += f" (chance {figure(100 * chance.mean, decimals=0)} %)" if chance else ""
    if control and (lost := best.points_lost):
        return f"{text}, {price(lost)}."
    return text + (f", at an accuracy of {figure(100 * best.accuracy.mean, decimals=1)} %." if best.accuracy else ".")


def price(lost: Spread) -> str:
    """What is paid for a setting."""
    if lost.mean < 0.05:
        return "at no loss of accuracy"
    return f"for {with_spread(lost.mean, lost.std, decimals=1)} points of accuracy"


def headlines(rows: Sequence[Row], results: Sequence[RunResult], fits: Mapping[str, Fit]) -> list[str]:
    """Gains of what defends best, which attacks were the worst, and what speaks against it all."""
    lines = []
    for row in shown_settings(rows)[-1:]:
        method, level = row.setting.method, row.setting.level
        others = dict.fromkeys(each.setting.method for each in rows if each.setting.level == level)
        fit = fits.get(level)
        if fit is None and others.keys() != {CONTROL}:
            lines.append(f"At equal accuracy nothing can be said: no run of {CONTROL} is finished at {level}.")
        elif fit is not None and not row.setting.is_control:
            gains = [_sentence(method, other, fit.gain(method, other)) for other in others if other != method]
            lines += gains[:MOST_METHODS]
            if len(gains) > MOST_METHODS:
                lines.append(f"{len(gains) - MOST_METHODS} more methods are in the table of gains.")
    finished = [result for result in results if result.status == "finished"]
    worst = Counter(result.worst for result in finished if result.worst)
    if worst:
        counts = ", ".join(f"{name} in {count}" for name, count in worst.most_common())
        lines.append(f"The worst attack by MSE, of {len(finished)} runs: {counts}.")
    if restless := [result for result in finished if result.restless]:
        names = ", ".join(dict.fromkeys(name for result in restless for name in result.restless))
        lines.append(
            f"In {len(restless)} of {len(finished)} runs an attack had not converged ({names}): with more time it "
            "would reconstruct more."
        )
    return [*lines, *_not_finished(results), LIMITS]


def interval(gain: Gain) -> str:
    """The ends of its interval, or why there is none."""
    if gain.low is None or gain.high is None:
        return gain.note
    return f"{figure(gain.low, decimals=2)} to {figure(gain.high, decimals=2)}"


def _sentence(method: str, other: str, gain: Gain) -> str:
    if gain.factor is None:
        return f"At equal accuracy nothing can be said of {method} over {other}: {gain.note}."
    if gain.low is None:
        basis = f"a direction and not a claim: {gain.note}"
    else:
        basis = f"95 %: {interval(gain)}; {gain.df} degrees of freedom"
        if not gain.is_claim:
            basis += f": a direction and not a claim{', ' + gain.note if gain.note else f', which takes {LEAST_DF}'}"
    return f"At equal accuracy {method} leaves attackers {gain.factor:.2f} times the error of {other} ({basis})."


def _pair(name: str, shown: Sequence[Row], factor: float = 1.0, decimals: int | None = None) -> str:
    """A figure of the last of the settings, against that of the first."""
    means = [each.mean * factor for row in reversed(shown) if (each := row.figures[name])]
    return " against ".join(figure(mean, decimals=decimals) for mean in means)


def _not_finished(results: Sequence[RunResult]) -> list[str]:
    lines = []
    failed = [result.run.name for result in results if result.status == "failed"]
    if failed:
        lines.append(f"{len(failed)} of {len(results)} runs failed: {', '.join(failed)}.")
    left = sum(result.status in ("unfinished", "not begun") for result in results)
    if left:
        lines.append(f"{left} of {len(results)} runs {'is' if left == 1 else 'are'} not finished: figures may change.")
    return lines
