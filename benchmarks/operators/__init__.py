"""The operators that are benchmarked, and the surrogate that they make: one case class each."""

from benchmarks.check import OWN, Verdict
from benchmarks.operators.base import DIRECTIONS, Call, Case, Cost, Spec
from benchmarks.operators.centroid_variance import CentroidVarianceCase
from benchmarks.operators.class_variance import ClassVarianceCase
from benchmarks.operators.cross_attention import CrossAttentionCase, GatedReadCase
from benchmarks.operators.slot_attention import SlotAttentionCase
from benchmarks.operators.slot_variance import SlotVarianceCase
from benchmarks.operators.surrogate import SurrogateCase

CASES: dict[str, type[Case]] = {
    "class_variance": ClassVarianceCase,
    "centroid_variance": CentroidVarianceCase,
    "slot_variance": SlotVarianceCase,
    "slot_attention": SlotAttentionCase,
    "gated_read": GatedReadCase,
    "cross_attention": CrossAttentionCase,
    "surrogate": SurrogateCase,
}

__all__ = ["CASES", "DIRECTIONS", "OWN", "Call", "Case", "Cost", "Spec", "Verdict"]
