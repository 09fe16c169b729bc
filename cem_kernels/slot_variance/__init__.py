"""What the variance of features around several running slots a class costs."""

from cem_kernels.slot_variance.api import slot_variance
from cem_kernels.slot_variance.running import RunningSlots

__all__ = ["RunningSlots", "slot_variance"]
