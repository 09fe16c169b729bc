"""The operators that are benchmarked: one case class each."""

from benchmarks.operators.base import DIRECTIONS, OWN, Call, Case, Cost, Spec, Verdict
from benchmarks.operators.class_variance import ClassVarianceCase
from benchmarks.operators.cross_attention import CrossAttentionCase, GatedReadCase

CASES: dict[str, type[Case]] = {
    "class_variance": ClassVarianceCase,
    "gated_read": GatedReadCase,
    "cross_attention": CrossAttentionCase,
}

__all__ = ["CASES", "DIRECTIONS", "OWN", "Call", "Case", "Cost", "Spec", "Verdict"]
