"""The sweep and the training step of ``python -m benchmarks.gpu``, everything but the clock."""

import json

import pytest
import torch
from fake_clock import CEILINGS, SMALL, HostTimer, report_with

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import sweep, training
from benchmarks.gpu.picture import draw_sweep
from benchmarks.operators import CASES
from cem_kernels import BackendUnavailableError


def point_of(spec):
    return sweep.measure_point("classes", spec, "cpu", HostTimer(), CEILINGS, 1000)


def build_of_triton(monkeypatch, build):
    """``build`` makes that variant of eager's."""
    usual = CASES["surrogate"].build

    def built(case, variant):
        return build(usual(case, "eager")) if variant == "triton" else usual(case, variant)

    monkeypatch.setattr(CASES["surrogate"], "build", built)


def test_a_point_says_where_it_is(monkeypatch):
    build_of_triton(monkeypatch, lambda call: call)
    point, failures = point_of(SMALL["surrogate"])
    assert failures == []
    assert point.pop("seconds") > 0
    sizes = {letter: getattr(SMALL["surrogate"], letter) for letter in "BKTD"}
    assert point == {"axis": "classes", "spec": SMALL["surrogate"].name, **sizes, "variant": "triton"}


def test_eager_stands_in_where_kernels_are_absent(monkeypatch):
    def absent(call):
        raise BackendUnavailableError("no kernels here")

    build_of_triton(monkeypatch, absent)
    point, failures = point_of(SMALL["surrogate"])
    assert (point["variant"], failures) == ("eager", [])


def test_kernels_that_are_wrong_are_no_point_but_a_failure(monkeypatch):
    build_of_triton(monkeypatch, lambda call: lambda *leaves: tuple(1.01 * loss for loss in call(*leaves)))
    point, failures = point_of(SMALL["surrogate"])
    assert point is None
    assert len(failures) == 1


def test_axes_vary_one_size_and_keep_the_other():
    assert {spec.K for spec in sweep.SWEEP["tokens"]} == {10}
    assert len({spec.B * spec.T for spec in sweep.SWEEP["classes"]}) == 1
    assert len(set(sweep.names())) == sum(len(specs) for specs in sweep.SWEEP.values())


def test_points_that_time_does_not_suffice_for_are_named(tmp_path):
    report = report_with(tmp_path)
    command.measure_sweep(report, "sweep over classes", "cpu", HostTimer(), 1000, lambda share=1.0: 0.0)
    assert report.data["left_out"] == [name for name in sweep.names() if "over classes" in name]
    assert report.data["sweep"] == []


def points(axis, sizes):
    common = {"axis": axis, "spec": "s", "B": 1, "K": 1, "T": 1, "D": 8, "variant": "triton"}
    letter = "B" if axis == "tokens" else "K"
    return [common | {letter: size, "seconds": 1e-5 * size} for size in sizes]


def test_the_picture_is_drawn_from_the_committed_file(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"sweep": points("tokens", [8, 64]) + points("classes", [2, 4, 8])}))
    draw_sweep(json.loads(file.read_text())["sweep"], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no sweep"):
        draw_sweep([], tmp_path / "sweep.png")


def fake_steps(monkeypatch, **broken):
    """Steps that do nothing; ``broken``: what building the step of a backend or of ``captured`` raises."""

    def step_of(surrogate, *, backend="auto", captured=False, **sizes):
        error = broken.get("captured" if captured else backend)
        if error is not None:
            raise error
        return lambda: torch.tensor(False)

    monkeypatch.setattr(training, "training_step", step_of)


def test_training_steps_are_timed_without_with_and_captured(monkeypatch):
    fake_steps(monkeypatch)
    record = training.measure_training("cpu", rounds=3)
    each = ["centroid", "centroid captured", "attention", "attention captured"]
    assert list(record["step_seconds"]) == ["none", *each]
    assert list(record["added"]) == each
    assert (record["backend"], record["absent"]) == ("triton", {})


def test_training_says_what_could_not_run(monkeypatch):
    fake_steps(monkeypatch, triton=BackendUnavailableError("no kernels"), captured=RuntimeError("no graph"))
    record = training.measure_training("cpu", rounds=3)
    assert list(record["step_seconds"]) == ["none", "centroid", "attention"]
    assert record["backend"] == "eager"
    assert record["absent"] == {
        "triton": "BackendUnavailableError: no kernels",
        "centroid captured": "RuntimeError: no graph",
        "attention captured": "RuntimeError: no graph",
    }


def test_convolutions_take_the_defaults_while_training_is_timed():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with training.pytorch_defaults():
            assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
