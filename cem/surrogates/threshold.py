"""Where the variance penalty begins."""

from __future__ import annotations

import warnings

from cem_kernels.validation import check_not_negative

FLOOR = 1e-8

REMEDY = (
    "The threshold is var_threshold * reg_strength**2, on the command line --var-threshold times --noise-std squared."
)


def coupled_threshold(var_threshold: float, reg_strength: float) -> float:
    """The original's threshold ``max(τσ², 1e-8)``, in squared feature units.

    Args:
        var_threshold: ``τ``, the share of the noise's variance that a feature may vary by inside its class.
        reg_strength: ``σ``, standard deviation of the noise at the cut.

    Raises:
        ValueError: ``τ`` or ``σ`` is negative or not finite.
    """
    check_not_negative(var_threshold=var_threshold, reg_strength=reg_strength)
    return max(var_threshold * reg_strength**2, FLOOR)


def warn_if_swamped(threshold: float, eps_var: float, gamma: float, *, stacklevel: int = 3) -> None:
    """Warn when ``eps_var`` or ``γ`` is so large that the threshold no longer decides anything.

    The penalty of a column is ``log(max(var, eps_var) + γ) − log(threshold + γ)``: with ``eps_var`` above the
    threshold it never reaches zero, and with ``γ`` above it the penalty begins at ``γ``.
    """
    if eps_var > threshold:
        warnings.warn(
            f"eps_var={eps_var:.3g} is above the variance threshold {threshold:.3g}: the penalty never reaches zero. "
            f"{REMEDY}",
            stacklevel=stacklevel,
        )
    if gamma > threshold:
        warnings.warn(
            f"gamma={gamma:.3g} is above the variance threshold {threshold:.3g}: the penalty begins at gamma, not at "
            f"the threshold. {REMEDY}",
            stacklevel=stacklevel,
        )
