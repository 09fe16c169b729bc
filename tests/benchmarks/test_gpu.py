"""``python -m benchmarks.gpu``, everything but the clock: a device is needed only to time."""

import json
import time

import pytest
import torch
from small import SMALL

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, correctness, measure, sweep, table, training
from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.gpu.errors import describe
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import copies_for, quantiles
from benchmarks.operators import CASES, DIRECTIONS
from cem_kernels import BackendUnavailableError

CEILINGS = {"copy": 4e12, "bf16": 8e14, "fp32": 5e13}
HERE = ("eager", "loop", "padded", "index-add", "segment-reduce", "gathered")  # neither compiled nor kernels


class HostTimer:
    """A clock for CPU tensors that only proves that every step runs."""

    def device_time(self, steps, uncapturable):
        for step in steps:
            assert all(isinstance(tensor, torch.Tensor) for tensor in step())
        start = time.perf_counter()
        steps[0]()
        return {"how": "events", "calls_per_sample": 1, **quantiles([time.perf_counter() - start + 1e-9] * 3)}

    def wall_time(self, steps):
        return quantiles([1e-3, 2e-3])

    def peak_bytes(self, step):
        return 1 << 20


@pytest.fixture(autouse=True)
def no_garbage_is_collected(monkeypatch):
    """Which takes longer than these batches."""
    monkeypatch.setattr(measure, "tidy", lambda: None)


def report_with(tmp_path, **data):
    report = Report(tmp_path / "new" / "gpu.json")
    ceilings = {name: {"rate": rate, "unit": "x/s"} for name, rate in CEILINGS.items()}
    report.set(environment={"device": "Some GPU"}, ceilings=ceilings, **data)
    return report


def record_of(spec, **seconds):
    """A case's record with these seconds for every direction of each variant."""
    figures = {
        variant.replace("_", "-"): {"status": "ok"} | {d: {"device": {"median": s}} for d in DIRECTIONS}
        for variant, s in seconds.items()
    }
    return {"name": spec.name, "variants": figures, "left_out": []}


def targets_of(spec, *records):
    return [target for target in cases.judge(list(records), CEILINGS) if target["case"] == spec.name]


def test_plans_have_names_of_their_own_and_known_variants():
    assert len({plan.spec.name for plan in PLANS}) == len(PLANS)
    for plan in PLANS:
        assert set(plan.names(quick=False)) <= set(CASES[plan.spec.operator].variants)
        assert "triton" in plan.names(quick=True)
        assert not any(name.endswith("-compiled") for name in plan.names(quick=True))


def test_targets_are_judged_from_what_was_measured_and_a_missing_peer_is_not_beaten():
    variance, read = (next(p.spec for p in PLANS if p.spec.operator == o) for o in ("class_variance", "gated_read"))
    moved = CASES["class_variance"].cost(variance, "backward").bytes
    forward, backward = targets_of(variance, record_of(variance, triton=moved / 4e12 / 0.82))
    assert (backward["reached"], backward["measured"], forward["reached"]) == (True, pytest.approx(0.82), False)
    record = record_of(read, triton=1e-5, padded_compiled=1.5e-5, flex_compiled=3e-5)
    named, _, of_bytes = targets_of(read, record)
    assert (named["reached"], named["fastest"], named["measured"]) == (False, "padded-compiled", pytest.approx(1.5))
    assert of_bytes["measured"] == pytest.approx(1e-5 * 4e12 / CASES["gated_read"].cost(read, "both").bytes)
    missing, *_ = targets_of(read, record_of(read, triton=1e-5, padded_compiled=1))
    assert (missing["reached"], missing["missing"]) == (None, ["flex-compiled"])
    assert [target["reached"] for target in targets_of(variance, record)] == [None, None]


def test_the_surrogate_is_held_against_loop_padded_batch_and_the_smaller_memory():
    spec = next(p.spec for p in PLANS if p.spec.operator == "surrogate" and p.spec.B == 128)  # 10 times, 2 times, 1/3
    record = record_of(spec, triton=1e-4, loop=2e-3, padded_compiled=5e-4, padded=9e-4)
    assert [target["reached"] for target in targets_of(spec, record)] == [True, True, None]
    for variant, peak, wall in (("triton", 30, 3e-4), ("padded", 100, 9e-4), ("padded-compiled", 80, 1.5e-4)):
        record["variants"][variant]["both"] |= {"peak_bytes": peak, "wall": {"median": wall}}
    loop, padded, memory = targets_of(spec, record)
    assert (loop["measured"], memory["measured"]) == (pytest.approx(20), pytest.approx(30 / 80))
    assert padded["measured"] == pytest.approx(1.5)  # it is quicker without a graph
    assert padded["launched"] == pytest.approx(0.5)
    assert (loop["reached"], padded["reached"], memory["reached"]) == (True, False, False)


def test_a_training_step_may_grow_by_a_twentieth():
    added = {"centroid": {"median": 0.08}, "centroid captured": {"median": 0.03}}
    verdicts = [t["reached"] for t in cases.judge_training({"name": "step", "backend": "triton", "added": added})]
    assert verdicts == [False, True, None, None]
    assert cases.judge_training({"name": "step", "backend": "eager", "added": added})[1]["reached"] is None


def test_what_was_expected_names_known_cases_and_stands_beside_them():
    (line,) = table.expected_lines("gated_read B1024 K10 T64 D128 S8 H4 bf16")
    assert line.split(maxsplit=1) == ["expected", "forward 16, backward 30 to 40 µs"]
    assert sum(len(table.expected_lines(plan.spec.name)) for plan in PLANS) > 10


def test_copies_move_three_times_the_cache_within_bounds():
    assert [copies_for(call_bytes=size, cache_bytes=60e6) for size in (1e9, 20e6, 1e3)] == [2, 9, 64]


def test_errors_are_told_without_folders():
    error = RuntimeError("cannot open /home/someone/lib/kernel.so: no such file\n  at line 3")
    assert describe(error) == "RuntimeError: cannot open kernel.so: no such file"


def measured(spec, names, seconds_left=1.0):
    return measure.measure_case(Plan(spec), names, "cpu", HostTimer(), CEILINGS, 1000, lambda: seconds_left)


def test_a_wrong_variant_gets_no_time_and_a_broken_one_stops_nobody(monkeypatch):
    plain = CASES["class_variance"].plain

    def sabotaged(self, variant):
        call = plain(self, variant)
        if variant == "padded":
            return lambda x: tuple(1.001 * output for output in call(x))
        if variant == "index-add":
            return lambda x: (_ for _ in ()).throw(RuntimeError("out of memory"))
        return call

    monkeypatch.setattr(CASES["class_variance"], "plain", sabotaged)
    record = measured(SMALL["class_variance"], ("padded", "index-add", "eager"))
    statuses = {name: found["status"] for name, found in record["variants"].items()}
    assert statuses == {"padded": "wrong", "index-add": "error", "eager": "ok"}
    assert "forward" not in record["variants"]["padded"]
    assert len(measure.failures_of(record)) == 2


def kernels_are(monkeypatch, build):
    """Of the surrogate: ``build`` makes them of eager, for nobody interprets them at length."""
    usual = CASES["surrogate"].build

    def built(case, variant):
        return build(usual(case, "eager")) if variant == "triton" else usual(case, variant)

    monkeypatch.setattr(CASES["surrogate"], "build", built)


def test_a_whole_run_checks_and_times_all_that_needs_no_device_and_writes_file_and_table(tmp_path, monkeypatch):
    added = {"added": {"attention": {"q1": 0.03, "median": 0.04, "q3": 0.05}}, "absent": {"x": "no graph here"}}
    steps = {"none": {"median": 5e-3}, "attention": {"median": 5.2e-3}}
    trained = {"name": "training step", "backend": "triton", "step_seconds": steps, **added}
    monkeypatch.setattr(correctness, "SPECS", [SMALL["gated_read"]])
    monkeypatch.setattr(sweep, "SWEEP", {"classes": [SMALL["surrogate"]]})
    monkeypatch.setattr(training, "measure_training", lambda device, rounds: dict(trained))
    kernels_are(monkeypatch, lambda call: call)
    plans = [Plan(spec, tuple(n for n in CASES[name].variants if n in HERE)) for name, spec in SMALL.items()]
    plans[-1] = Plan(SMALL["surrogate"], ("triton", *plans[-1].variants))
    report = report_with(tmp_path)
    options = command.parse(["--no-sanitizer"])
    assert command.run(report, options, plans, "cpu", HostTimer(), 1000, lambda share=1.0: 1.0) == []
    data = json.loads(report.path.read_text())
    timed = [(case["name"], tuple(case["variants"])) for case in data["cases"]]
    assert timed == [(plan.spec.name, plan.variants) for plan in plans]
    assert data["correctness"][0]["status"] == "ok"
    sizes = {letter: getattr(SMALL["surrogate"], letter) for letter in "BKTD"}
    (point,) = data["sweep"]
    assert point.pop("seconds") > 0
    assert point == {"axis": "classes", "spec": SMALL["surrogate"].name, **sizes, "variant": "triton"}
    assert data["training"] == trained
    assert {target["reached"] for target in data["targets"] if target["case"] != "training step"} == {None}
    text = table.text(report.data, ["something broke"])
    for expected in (*(spec.name for spec in SMALL.values()), "not measured", "1 failed:", "something broke", "+4.0%"):
        assert expected in text
    assert max(len(line) for line in text.splitlines()) <= 140


@pytest.mark.parametrize(("kernels", "variant", "failures"), [("absent", "eager", 0), ("wrong", None, 1)])
def test_eager_stands_in_where_kernels_are_absent_and_not_where_they_are_wrong(monkeypatch, kernels, variant, failures):
    def build(call):
        if kernels == "absent":
            raise BackendUnavailableError("no kernels here")
        return lambda *leaves: tuple(1.01 * loss for loss in call(*leaves))

    kernels_are(monkeypatch, build)
    point, found = sweep.measure_point("classes", SMALL["surrogate"], "cpu", HostTimer(), CEILINGS, 1000)
    assert (point and point["variant"], len(found)) == (variant, failures)


def test_what_time_does_not_suffice_for_is_named(tmp_path):
    record = measured(SMALL["class_variance"], ("eager", "loop"), seconds_left=0.0)
    assert (record["variants"], record["left_out"]) == ({}, ["eager", "loop"])
    report = report_with(tmp_path)
    command.measure_sweep(report, "sweep over classes", "cpu", HostTimer(), 1000, lambda share=1.0: 0.0)
    assert report.data["left_out"] == [name for name in sweep.names() if "over classes" in name]
    assert report.data["sweep"] == []


NO_GRAPH, NO_KERNELS = RuntimeError("no graph"), BackendUnavailableError("no kernels")


@pytest.mark.parametrize("broken", [{}, {"captured": NO_GRAPH}, {"triton": NO_KERNELS}], ids=str)
def test_training_steps_are_timed_without_with_and_captured_as_far_as_they_run(monkeypatch, broken):
    def step_of(surrogate, *, backend="auto", captured=False, **sizes):
        error = broken.get("captured" if captured else backend)
        if error is not None:
            raise error
        assert torch.backends.cudnn.allow_tf32  # as a training has it
        return lambda: torch.tensor(False)

    monkeypatch.setattr(training, "training_step", step_of)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    record = training.measure_training("cpu", rounds=3)
    assert not torch.backends.cudnn.allow_tf32
    each = ["centroid", "centroid captured", "attention", "attention captured"]
    timed = [name for name in each if "captured" not in broken or "captured" not in name]
    assert (list(record["step_seconds"]), list(record["added"])) == (["none", *timed], timed)
    assert set(record["absent"]) == {*each} - {*timed} | {*broken} - {"captured"}
    assert record["backend"] == ("eager" if "triton" in broken else "triton")


def test_a_broken_training_step_is_a_failure_and_stops_nothing(tmp_path, monkeypatch):
    def broken(device, rounds):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "measure_training", broken)
    report = report_with(tmp_path)
    command.measure_training(report, False, "cpu", lambda share=1.0: 1.0)
    assert report.failures() == [f"{training.NAME}: RuntimeError: out of memory"]


def test_predictions_need_no_device_and_say_what_they_are(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    assert command.main(["--predict", "--only", "class_variance B4096", "--copy-rate", "1e12", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("PREDICTED, not measured")
    data = json.loads(out.read_text())
    forward = data["predictions"]["class_variance B4096 K100 T64 D128 fp32"]["forward"]
    assert forward["floor_seconds"] == pytest.approx(1.3425e-4, rel=1e-3)
    assert forward["bound_by"] == "bytes"


def test_without_a_device_or_a_case_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert command.main(["--only", "no such case"]) == 2
    assert PLANS[0].spec.name in capsys.readouterr().err
