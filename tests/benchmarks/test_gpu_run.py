"""A run of ``python -m benchmarks.gpu``, everything but the clock: a device is needed only to time."""

import json

import pytest
import torch
from fake_clock import CEILINGS, SMALL, HostTimer, report_with

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, measure, sanitize, sweep, table, training
from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.operators import CASES
from cem_kernels import BackendUnavailableError


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


def test_variants_that_time_does_not_suffice_for_are_named():
    record = measured(SMALL["class_variance"], ("eager", "loop"), seconds_left=0.0)
    assert (record["variants"], record["left_out"]) == ({}, ["eager", "loop"])


def test_the_file_is_whole_after_every_addition(tmp_path):
    report = report_with(tmp_path)
    for number in range(3):
        report.add("left_out", f"case {number}")
        assert len(json.loads(report.path.read_text())["left_out"]) == number + 1
    assert [p.name for p in report.path.parent.iterdir()] == ["gpu.json"]


def test_a_whole_run_writes_the_file_and_the_table(tmp_path, monkeypatch):
    added = {"added": {"attention": {"q1": 0.03, "median": 0.04, "q3": 0.05}}, "absent": {"x": "no graph here"}}
    steps = {"none": {"median": 5e-3}, "attention": {"median": 5.2e-3}}
    trained = {"name": "training step", "backend": "triton", "step_seconds": steps, **added}
    monkeypatch.setattr(correctness, "SPECS", [SMALL["gated_read"]])
    monkeypatch.setattr(sweep, "SWEEP", {"classes": [SMALL["surrogate"]]})
    monkeypatch.setattr(training, "measure_training", lambda device, rounds: dict(trained))
    usual = CASES["surrogate"].build
    eager = "eager"  # kernels that nobody interprets at length
    monkeypatch.setattr(
        CASES["surrogate"], "build", lambda case, name: usual(case, eager if name == "triton" else name)
    )
    plans = [
        Plan(spec, ("triton", "loop") if name == "surrogate" else ("eager", "loop")) for name, spec in SMALL.items()
    ]
    report = report_with(tmp_path, predictions=measure.predictions(plans, CEILINGS))
    options = command.parse(["--no-sanitizer"])
    assert command.run(report, options, plans, "cpu", HostTimer(), 1000, lambda share=1.0: 1.0) == []
    data = json.loads(report.path.read_text())
    assert [case["name"] for case in data["cases"]] == [spec.name for spec in SMALL.values()]
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
    assert max(len(line) for line in text.splitlines()) <= 160


def point_of(monkeypatch, build):
    """A point of the sweep; ``build`` makes the kernels' variant of eager's."""
    usual, spec = CASES["surrogate"].build, SMALL["surrogate"]
    built = lambda case, name: build(usual(case, "eager")) if name == "triton" else usual(case, name)  # noqa: E731
    monkeypatch.setattr(CASES["surrogate"], "build", built)
    return sweep.measure_point("classes", spec, "cpu", HostTimer(), CEILINGS, 1000)


def test_eager_stands_in_where_kernels_are_absent(monkeypatch):
    def absent(call):
        raise BackendUnavailableError("no kernels here")

    point, failures = point_of(monkeypatch, absent)
    assert (point["variant"], failures) == ("eager", [])


def test_kernels_that_are_wrong_are_no_point_but_a_failure(monkeypatch):
    point, failures = point_of(monkeypatch, lambda call: lambda *leaves: tuple(1.01 * loss for loss in call(*leaves)))
    assert (point, len(failures)) == (None, 1)


def test_the_sweep_varies_one_size_and_keeps_the_other_and_names_what_it_leaves_out(tmp_path):
    assert {spec.K for spec in sweep.SWEEP["tokens"]} == {10}
    assert len({spec.B * spec.T for spec in sweep.SWEEP["classes"]}) == 1
    report = report_with(tmp_path)
    command.measure_sweep(report, "sweep over classes", "cpu", HostTimer(), 1000, lambda share=1.0: 0.0)
    assert report.data["left_out"] == [name for name in sweep.names() if "over classes" in name]
    assert report.data["sweep"] == []


EACH = ["centroid", "centroid captured", "attention", "attention captured"]


@pytest.mark.parametrize(
    ("broken", "timed", "absent"),
    [
        ({}, EACH, []),
        (
            {"captured": RuntimeError("no graph")},
            ["centroid", "attention"],
            ["centroid captured", "attention captured"],
        ),
        ({"triton": BackendUnavailableError("no kernels")}, EACH, ["triton"]),
    ],
    ids=["all there", "no graph", "no kernels"],
)
def test_training_steps_are_timed_without_with_and_captured_as_far_as_they_run(monkeypatch, broken, timed, absent):
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
    assert list(record["step_seconds"]) == ["none", *timed]
    assert list(record["added"]) == timed
    assert list(record["absent"]) == absent
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
    assert data["cases"] == []


def test_without_a_device_or_a_case_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert command.main(["--only", "no such case"]) == 2
    assert PLANS[0].spec.name in capsys.readouterr().err


def test_the_sanitizer_is_absent_where_it_is_not_installed_and_what_it_watches_runs(monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.sanitize("memcheck", timeout=1) == {"tool": "memcheck", "status": "absent"}
    assert len(sanitize.run_kernels("cpu", "eager")) == len(sanitize.SPECS)
