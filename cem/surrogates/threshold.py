"""Where the variance penalty begins."""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cem_kernels import ClassGroups
from cem_kernels.validation import check_not_negative, check_positive

FLOOR = 1e-8
KEPT = 0.9  # of the running quantile, in a step

Policy = Literal["coupled", "fixed", "ramp", "quantile"]
POLICIES: tuple[str, ...] = get_args(Policy)

REMEDY = (
    "The threshold is var_threshold * reg_strength**2, on the command line --var-threshold times --noise-std squared."
)
REMEDY_OF_FIXED = "The threshold is threshold_value, on the command line --threshold-value."


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


class Threshold(nn.Module):
    """A threshold on variances that may change while training goes on.

    ``coupled``
        :func:`coupled_threshold`, the original's.
    ``fixed``
        ``value``, whatever the noise is: the original's author suggests log 0.05 for normalized features.
    ``ramp``
        From ``value`` down to the coupled one, in equal factors from epoch to epoch: accuracy first, robustness later.
        A ``value`` below the coupled one is an error.
    ``quantile``
        The ``quantile`` of the variances that the features have inside their classes (the value below it, where it
        lies between two), a running mean over steps, and never below the coupled one: always the wider columns are
        penalized, however wide all of them are. Around slots that are trained variances are smaller than that.

    Args:
        policy: one of :data:`POLICIES`.
        coupled: the original's threshold, positive.
        value: of ``fixed`` and ``ramp``, positive.
        quantile: of ``quantile``, in (0, 1).

    Attributes:
        level: where it stands, 0-dim fp32; a buffer, in the state dict, of the policies that move.

    Raises:
        ValueError: unknown policy, or a number out of range.
    """

    level: Tensor
    seen: Tensor

    def __init__(self, policy: Policy, coupled: float, value: float = 0.05, quantile: float = 0.5) -> None:
        super().__init__()
        if policy not in POLICIES:
            raise ValueError(f"threshold must be one of {', '.join(POLICIES)}, got {policy!r}")
        check_positive(threshold_value=value)
        if policy == "ramp" and value < coupled:
            raise ValueError(f"a ramp falls to {coupled:.3g}, so threshold_value must not be below it, got {value}")
        if not 0 < quantile < 1:
            raise ValueError(f"threshold_quantile must lie between 0 and 1, got {quantile}")
        self.policy, self.coupled, self.value, self.quantile = policy, coupled, value, quantile
        if policy in ("ramp", "quantile"):
            self.register_buffer("level", torch.tensor(value if policy == "ramp" else coupled))
        if policy == "quantile":
            self.register_buffer("seen", torch.tensor(False))

    @property
    def lowest(self) -> float:
        """The value that it ends at, or cannot fall below."""
        return self.value if self.policy == "fixed" else self.coupled

    def forward(self) -> float | Tensor:
        """The threshold of this step: a number where it never changes, else :attr:`level`."""
        return self.level if self.policy in ("ramp", "quantile") else self.lowest

    def begin_epoch(self, progress: float) -> None:
        """Move a ramp: ``progress`` goes from 0, the first epoch with a penalty, to 1, the last one."""
        if self.policy == "ramp":
            self.level.fill_(math.exp((1 - progress) * math.log(self.value) + progress * math.log(self.coupled)))

    @torch.no_grad()
    def observe(self, features: Tensor, groups: ClassGroups, min_samples: int, num_classes: int) -> None:
        """Move a quantile by the variances of ``features [B, ...]`` inside the first ``num_classes`` of their classes.

        Classes of fewer samples do not count; nothing waits for the device.
        """
        if self.policy != "quantile":
            return
        classes = torch.arange(groups.num_classes, device=features.device)
        qualifies = (groups.counts >= min_samples) & (classes < num_classes)
        labels = groups.labels
        # Replaced, not multiplied by zero: what does not count may be infinite.
        x = torch.where(qualifies[labels][:, None], features.detach().flatten(1), 0)
        with torch.autocast(x.device.type, enabled=False):
            member = (classes[:, None] == labels).to(x.dtype)
            count = groups.counts[:, None].to(x.dtype)
            mean = member @ x / count.clamp(min=1)
            variance = member @ (x - mean[labels]).square() / (count - 1).clamp(min=1)
        # Chosen from a sorted list by a place that the device works out: what does not count goes to its end.
        ordered = torch.where(qualifies[:, None], variance, math.inf).flatten().sort().values
        last = (qualifies.sum() * x.shape[1] - 1).clamp(min=0)
        found = ordered.index_select(0, (last * self.quantile).long().view(1))[0]
        found = found.clamp(min=self.coupled).to(self.level.dtype)
        moved = torch.where(self.seen, KEPT * self.level + (1 - KEPT) * found, found)
        usable = qualifies.any() & torch.where(qualifies[:, None], variance, 0).isfinite().all()
        self.level.copy_(torch.where(usable, moved, self.level))
        self.seen.copy_(self.seen | usable)


def warn_if_swamped(
    threshold: float, eps_var: float, gamma: float, remedy: str = REMEDY, *, stacklevel: int = 3
) -> None:
    """Warn when ``eps_var`` or ``γ`` is so large that the threshold no longer decides anything.

    The penalty of a column is ``log(max(var, eps_var) + γ) − log(threshold + γ)``: with ``eps_var`` above the
    threshold it never reaches zero, and with ``γ`` above it the penalty begins at ``γ``.
    """
    if eps_var > threshold:
        warnings.warn(
            f"eps_var={eps_var:.3g} is above the variance threshold {threshold:.3g}: the penalty never reaches zero. "
            f"{remedy}",
            stacklevel=stacklevel,
        )
    if gamma > threshold:
        warnings.warn(
            f"gamma={gamma:.3g} is above the variance threshold {threshold:.3g}: the penalty begins at gamma, not at "
            f"the threshold. {remedy}",
            stacklevel=stacklevel,
        )
