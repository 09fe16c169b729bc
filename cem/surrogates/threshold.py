"""Where the penalty of a log-variance begins."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from cem_kernels.validation import check_not_negative, check_positive

FLOOR = 1e-8


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


class Ramp(nn.Module):
    """A threshold that moves from ``start`` to ``end`` in equal factors from epoch to epoch.

    Downward it lets classification be learned first and robustness later.

    Args:
        start: of the first epoch with a penalty, positive.
        end: of the last one, positive.

    Attributes:
        level: where it stands, 0-dim fp32; a buffer, so that a captured graph sees it move and a run resumes.

    Raises:
        ValueError: a threshold is not finite and positive.

    Example::

        >>> import cem
        >>> ramp = cem.Ramp(0.04, 0.0001)
        >>> ramp.before_epoch(1, 3)
        >>> round(ramp().item(), 4)
        0.002
    """

    level: Tensor

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        check_positive(start=start, end=end)
        self.start, self.end = start, end
        self.register_buffer("level", torch.tensor(start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The threshold of this epoch."""
        return self.level

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Move to ``epoch`` of ``epochs``, see :meth:`cem.Term.before_epoch`; before the first it is ``start``."""
        progress = max(epoch, 0) / (epochs - 1) if epochs > 1 else 1.0
        self.level.fill_(math.exp((1 - progress) * math.log(self.start) + progress * math.log(self.end)))

    def extra_repr(self) -> str:
        return f"{self.start:g}, {self.end:g}"


def warn_if_swamped(threshold: float, eps_var: float, gamma: float, *, stacklevel: int = 3) -> None:
    """Warn when ``eps_var`` or ``γ`` is so large that the threshold no longer decides anything.

    The penalty of a column is ``log(max(var, eps_var) + γ) − log(threshold + γ)``: with ``eps_var`` above the
    threshold it never reaches zero, and with ``γ`` above it the penalty begins at ``γ``.
    """
    effects = {"eps_var": "never reaches zero", "gamma": "begins at gamma, not at the threshold"}
    for (name, effect), value in zip(effects.items(), (eps_var, gamma), strict=True):
        if value > threshold:
            warnings.warn(
                f"{name}={value:.3g} is above the variance threshold {threshold:.3g}: the penalty {effect}. The "
                "threshold, unless one is given, is var_threshold times the variance of the noise, at least 1e-8",
                stacklevel=stacklevel,
            )
