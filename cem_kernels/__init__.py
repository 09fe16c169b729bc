"""Attention operators on class groups: every class of a batch at once, from labels to statistics.

Operators live in their packages, each a documented function that validates its input and dispatches to a backend:

* :func:`cem_kernels.slot_attention.slot_attention`: the tokens of a class to its slots;
* :func:`cem_kernels.cross_attention.cross_attention`: every token reads its class's slots;
* :func:`cem_kernels.variance.class_variance`: what the variance inside each class costs;
* :func:`cem_kernels.variance.centroid_variance`: the same around running centroids of the classes;
* :func:`cem_kernels.slot_variance.slot_variance`: the same around several running slots a class.

Here are the types that they take and return, the penalties, and the errors. Importing this package needs neither a GPU
nor Triton.
"""

from cem_kernels.backends import BACKENDS, BackendUnavailableError
from cem_kernels.cross_attention.weights import CrossAttentionWeights
from cem_kernels.groups import IGNORED, ClassGroups
from cem_kernels.penalty import LogHinge, Nats, Penalty
from cem_kernels.slot_attention.weights import SlotAttentionWeights
from cem_kernels.slot_variance.running import RunningSlots
from cem_kernels.validation import set_debug
from cem_kernels.variance.running import ClassVariance, RunningMoments

__all__ = [
    "BACKENDS",
    "IGNORED",
    "BackendUnavailableError",
    "ClassGroups",
    "ClassVariance",
    "CrossAttentionWeights",
    "LogHinge",
    "Nats",
    "Penalty",
    "RunningMoments",
    "RunningSlots",
    "SlotAttentionWeights",
    "set_debug",
]
