"""What a comparison found, in sentences that follow from its figures alone."""

from __future__ import annotations

from collections.abc import Sequence

from cem.comparison.results import RunResult
from cem.comparison.statistics import Row, Spread, dominated
from cem.report.numbers import with_spread

LIMITS = (
    "An attack shows that at least so much leaks: the figures are lower bounds on leakage, because a stronger "
    "attacker than those tried may exist. Nothing here is a certificate of privacy."
)

MOST_SETTINGS = 8
"""Settings that get a sentence of their own; the others are in the table."""


def headlines(rows: Sequence[Row], results: Sequence[RunResult]) -> list[str]:
    """The most private and the most accurate setting, every penalty against none, and what speaks against it all."""
    scored = [(row, accuracy, mse) for row in rows if (accuracy := row.accuracy) and (mse := row.mse)]
    if not scored:
        return ["No run is finished yet.", *_not_finished(results), LIMITS]
    private, its_accuracy, its_mse = max(scored, key=lambda each: each[2].mean)
    lines = [
        f"The attacker errs most on {private.setting}: MSE {_text(its_mse)} on unseen images, at a test accuracy of "
        f"{_percent(its_accuracy)}."
    ]
    accurate, its_accuracy, its_mse = max(scored, key=lambda each: each[1].mean)
    if accurate is not private:
        lines.append(
            f"The most accurate is {accurate.setting}: test accuracy {_percent(its_accuracy)}, at an attack MSE of "
            f"{_text(its_mse)}."
        )
    against = [line for row in rows if not row.setting.is_control and (line := _against_none(row))]
    lines += against[:MOST_SETTINGS]
    if len(against) > MOST_SETTINGS:
        lines.append(f"{len(against) - MOST_SETTINGS} more settings are in the table.")
    for setting, better in dominated(rows).items():
        if not setting.is_control:
            lines.append(f"On average {better} is more private than {setting}, and no less accurate.")
    finished = [result for result in results if result.status == "finished"]
    restless = sum(result.converged is not True for result in finished)
    if restless:
        lines.append(
            f"In {restless} of {len(finished)} runs the strongest attacker had not converged: trained for longer, it "
            "would reconstruct more."
        )
    if inverted := [result for result in finished if _white_box_is_stronger(result)]:
        lines.append(
            f"In {len(inverted)} of {len(finished)} runs the white-box attack, which knows the client's weights, "
            "reconstructs the few unseen images that it was tried on with a smaller MSE than the strongest decoder "
            "does: that decoder's figures understate what leaks."
        )
    return [*lines, *_not_finished(results), LIMITS]


def _white_box_is_stronger(result: RunResult) -> bool:
    white_box, decoder = result.figures["white_box_test_mse"], result.figures["white_box_decoder_test_mse"]
    return white_box is not None and decoder is not None and white_box < decoder


def _against_none(row: Row) -> str | None:
    ratio, points = row.figures["mse_ratio"], row.figures["accuracy_difference"]
    if ratio is None or points is None:
        return None
    seeds = "1 seed" if ratio.n == 1 else f"{ratio.n} seeds"
    times, change = (
        with_spread(spread.mean, spread.std, decimals=decimals) for spread, decimals in ((ratio, 2), (points, 1))
    )
    return (
        f"{row.setting}, relative to none at the same noise: {times} times the attack MSE, {change} points of test "
        f"accuracy ({seeds})."
    )


def _not_finished(results: Sequence[RunResult]) -> list[str]:
    lines = []
    failed = [result.run.name for result in results if result.status == "failed"]
    if failed:
        lines.append(f"{len(failed)} of {len(results)} runs failed: {', '.join(failed)}.")
    left = sum(result.status in ("unfinished", "not begun") for result in results)
    if left:
        lines.append(f"{left} of {len(results)} runs {'is' if left == 1 else 'are'} not finished: figures may change.")
    return lines


def _text(spread: Spread) -> str:
    return with_spread(spread.mean, spread.std)


def _percent(spread: Spread) -> str:
    std = None if spread.std is None else 100 * spread.std
    return with_spread(100 * spread.mean, std, decimals=1) + " %"
