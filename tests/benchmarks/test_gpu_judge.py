"""What ``python -m benchmarks.gpu`` makes of its figures: targets, quantiles, copies past the cache."""

import pytest
from fake_clock import CEILINGS, SMALL, record_of

from benchmarks.gpu import cases
from benchmarks.gpu.cases import PLANS
from benchmarks.gpu.errors import describe
from benchmarks.gpu.table import expected_lines
from benchmarks.gpu.timing import copies_for, quantiles
from benchmarks.operators import CASES


def judged(operator):
    return next(plan.spec for plan in PLANS if plan.judged and plan.spec.operator == operator)


def test_plans_have_names_of_their_own_and_known_variants():
    assert len({plan.spec.name for plan in PLANS}) == len(PLANS)
    for plan in PLANS:
        assert set(plan.names(quick=False)) <= set(CASES[plan.spec.operator].variants)
        assert "triton" in plan.names(quick=True)
        assert not any(name.endswith("-compiled") for name in plan.names(quick=True))


def test_targets_are_judged_from_what_was_measured():
    variance, read = judged("class_variance"), judged("gated_read")
    moved = CASES["class_variance"].cost(variance, "backward").bytes
    records = [
        record_of(variance, triton=moved / 4e12 / 0.82),
        record_of(read, triton=1e-5, padded_compiled=1.5e-5, flex_compiled=3e-5),
    ]
    found = cases.judge(records, CEILINGS)
    forward, backward = (t for t in found if t["case"] == variance.name)
    assert (backward["reached"], backward["measured"]) == (True, pytest.approx(0.82))
    assert forward["reached"] is False
    of_read = [t for t in found if t["case"] == read.name]
    assert (of_read[0]["reached"], of_read[0]["fastest"]) == (False, "padded-compiled")
    assert of_read[0]["measured"] == pytest.approx(1.5)
    assert of_read[2]["measured"] == pytest.approx(1e-5 * 4e12 / CASES["gated_read"].cost(read, "both").bytes)
    unmeasured = [t for t in found if t["case"] not in (variance.name, read.name)]
    assert unmeasured
    assert all(t["reached"] is None and t["measured"] is None for t in unmeasured)


def surrogate_targets(**more):
    """At B 128, K 10, T 1, where 10 times the loop and 2 times padded-compiled are wanted."""
    spec = next(p.spec for p in PLANS if p.spec.operator == "surrogate" and p.spec.B == 128)
    record = record_of(spec, triton=1e-4, loop=2e-3, padded_compiled=5e-4, padded=9e-4)
    for variant, figures in more.items():
        record["variants"][variant.replace("_", "-")]["both"] |= figures
    return [t for t in cases.judge([record], CEILINGS) if t["case"] == spec.name]


def test_the_surrogate_is_held_against_loop_padded_batch_and_the_smaller_memory():
    peaks = {name: {"peak_bytes": size} for name, size in (("triton", 30), ("padded", 100), ("padded_compiled", 80))}
    loop, padded, memory = surrogate_targets(**peaks)
    assert (loop["measured"], loop["reached"]) == (pytest.approx(20), True)
    assert (padded["measured"], padded["reached"]) == (pytest.approx(5), True)
    assert (memory["measured"], memory["reached"]) == (pytest.approx(30 / 80), False)


def test_a_peer_may_be_quicker_without_a_graph_than_with_one():
    wall = {"triton": {"wall": {"median": 3e-4}}, "padded_compiled": {"wall": {"median": 1.5e-4}}}
    _, padded, memory = surrogate_targets(**wall)
    assert (padded["measured"], padded["reached"]) == (pytest.approx(1.5), False)
    assert padded["launched"] == pytest.approx(0.5)
    assert memory["reached"] is None


def test_a_missing_peer_is_not_beaten():
    record = record_of(SMALL["gated_read"], triton=1e-5, padded_compiled=1e-3)
    found = cases.times_faster(record, "of two", cases.NAMED_PEERS)
    assert (found["measured"], found["reached"]) == (pytest.approx(100), None)
    assert found["missing"] == ["flex-compiled"]


def test_a_training_step_may_grow_by_a_twentieth():
    added = {"centroid": {"median": 0.08}, "centroid captured": {"median": 0.03}}
    verdicts = [t["reached"] for t in cases.judge_training({"name": "step", "backend": "triton", "added": added})]
    assert verdicts == [False, True, None, None]
    of_eager = cases.judge_training({"name": "step", "backend": "eager", "added": added})
    assert [t["reached"] for t in of_eager] == [None] * 4  # says nothing about the kernels


def test_what_was_expected_names_known_cases_and_stands_beside_them():
    assert expected_lines("gated_read B1024 K10 T64 D128 S8 H4 bf16") == [
        f"{'expected':18}forward 16, backward 30 to 40 µs"
    ]
    assert expected_lines("no such case") == []
    assert sum(len(expected_lines(plan.spec.name)) for plan in PLANS) > 10


@pytest.mark.parametrize(("call_bytes", "copies"), [(1e9, 2), (20e6, 9), (1e3, 64)])
def test_copies_move_three_times_the_cache_within_bounds(call_bytes, copies):
    assert copies_for(call_bytes=call_bytes, cache_bytes=60e6) == copies


def test_quantiles_keep_every_sample():
    found = quantiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found["q20"], found["median"], found["q80"]) == pytest.approx((1.8, 3.0, 4.2))
    assert found["samples"] == [5.0, 1.0, 3.0, 2.0, 4.0]


def test_errors_are_told_without_folders():
    error = RuntimeError("cannot open /home/someone/lib/kernel.so: no such file\n  at line 3")
    assert describe(error) == "RuntimeError: cannot open kernel.so: no such file"
