"""Attention operators on class groups: every class of a batch at once, from labels to statistics.

Operators, each a documented function that validates its input and dispatches to a backend:

* :func:`slot_attention`: the tokens of a class to its slots;
* :func:`cross_attention`: every token reads its class's slots;
* :func:`class_variance`: variance inside each class over a log threshold;
* :func:`centroid_variance`: variance around running centroids of the classes, over the same.

Importing this package needs neither a GPU nor Triton.
"""

from cem_kernels.backends import BACKENDS, BackendUnavailableError
from cem_kernels.centroid_variance import RunningMoments, centroid_variance
from cem_kernels.class_variance import ClassVariance, class_variance
from cem_kernels.cross_attention import CrossAttentionWeights, cross_attention
from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention import SlotAttentionWeights, slot_attention
from cem_kernels.validation import set_debug

__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "ClassGroups",
    "ClassVariance",
    "CrossAttentionWeights",
    "RunningMoments",
    "SlotAttentionWeights",
    "centroid_variance",
    "class_variance",
    "cross_attention",
    "set_debug",
    "slot_attention",
]
