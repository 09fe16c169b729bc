"""The report of ``python -m benchmarks.gpu``, everything but the clock: a device is needed only to time."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is no installed package

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, correctness, measure, sanitize, table
from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.gpu.errors import describe
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import copies_for, quantiles
from benchmarks.operators import CASES, DIRECTIONS, Spec

CEILINGS = {"copy": 4e12, "bf16": 8e14, "fp32": 5e13}
ENVIRONMENT = {"device": "Some GPU", "torch": torch.__version__}

SMALL = {
    "class_variance": Spec("class_variance", B=24, K=4, T=2, D=16, labels="holes"),
    "gated_read": Spec("gated_read", B=24, K=4, T=3, D=32, S=3, H=2, labels="holes"),
    "cross_attention": Spec("cross_attention", B=24, K=4, T=3, D=32, S=3, H=2),
}
every_operator = pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL.keys())


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


def measured(spec, names, **more):
    return measure.measure_case(
        Plan(spec), names, "cpu", HostTimer(), CEILINGS, 1000, more.get("seconds_left", lambda: 1.0)
    )


def report_with(tmp_path, **data):
    report = Report(tmp_path / "new" / "gpu.json")
    ceilings = {name: {"rate": rate, "unit": "x/s"} for name, rate in CEILINGS.items()}
    report.set(environment=ENVIRONMENT, ceilings=ceilings, **data)
    return report


def test_class_variance_reads_once_and_then_reads_and_writes_once():
    spec = Spec("class_variance", B=4096, K=100, T=64, D=128, dtype="bf16")
    features, order = 4096 * 8192 * 2, 4096 * 8
    case = CASES["class_variance"]
    assert case.cost(spec, "forward").bytes == features + order
    assert case.cost(spec, "backward").bytes == 2 * features + order
    assert case.cost(spec, "both").bytes == 3 * features + 2 * order


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operator", ["gated_read", "cross_attention"])
def test_attention_bytes_are_those_of_its_tensors(operator, dtype):
    spec = Spec(operator, B=12, K=3, T=2, D=32, S=3, H=2, dtype=dtype)
    case = CASES[operator](spec, "cpu")
    inputs = sum(leaf.nbytes for leaf in case.leaves.values())
    (output,) = case.build("eager")(*case.leaves.values())
    moved = inputs + output.nbytes + case.groups.order.nbytes
    assert case.cost(spec, "forward").bytes == moved
    assert case.cost(spec, "backward").bytes == moved + inputs


def test_absorbing_counts_only_where_it_is_cheaper():
    many = CASES["gated_read"].cost(Spec("gated_read", B=1024, K=10, T=64, D=128), "forward")
    assert many.operations == 4 * 65536 * 128 * 32 + 8 * 80 * 128**2
    few = CASES["gated_read"].cost(Spec("gated_read", B=8, K=100, T=1, D=128), "forward")
    assert few.operations == 4 * 8 * 128 * 128 + 4 * 8 * 8 * 128 + 4 * 800 * 128**2


def test_plans_have_names_of_their_own_and_known_variants():
    assert len({plan.spec.name for plan in PLANS}) == len(PLANS)
    for plan in PLANS:
        assert set(plan.names(quick=False)) <= set(CASES[plan.spec.operator].variants)
        assert "triton" in plan.names(quick=True)
        assert not any(name.endswith("-compiled") for name in plan.names(quick=True))


@every_operator
def test_every_variant_that_needs_no_device_is_checked_and_timed(spec):
    names = [n for n in CASES[spec.operator].variants if not n.endswith("-compiled")]
    record = measured(spec, names)
    statuses = {name: found["status"] for name, found in record["variants"].items()}
    assert statuses == dict.fromkeys(names, "ok")
    for name in names:
        for direction in DIRECTIONS:
            assert record["variants"][name][direction]["device"]["median"] > 0
    assert measure.failures_of(record) == []


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
    assert record["variants"]["padded"]["status"] == "wrong"
    assert "forward" not in record["variants"]["padded"]
    assert record["variants"]["index-add"]["status"] == "error"
    assert record["variants"]["eager"]["status"] == "ok"
    assert len(measure.failures_of(record)) == 2


def test_nan_never_passes():
    case = CASES["class_variance"](SMALL["class_variance"], "cpu")
    call = case.build("eager")
    assert not case.check("eager", lambda x: tuple(output * float("nan") for output in call(x))).passed


def test_variants_that_time_does_not_suffice_for_are_named():
    record = measured(SMALL["class_variance"], ("eager", "loop"), seconds_left=lambda: 0.0)
    assert record["variants"] == {}
    assert record["left_out"] == ["eager", "loop"]


def test_a_case_that_cannot_be_made_is_one_failure():
    record = measured(Spec("gated_read", B=4, K=2, T=1, D=30, H=4), ("eager",))
    assert record["variants"]["eager"]["status"] == "error"
    assert len(measure.failures_of(record)) == 1


@pytest.mark.parametrize("spec", correctness.SPECS, ids=lambda spec: spec.name)
def test_eager_passes_the_checks_that_kernels_have_to_pass(spec):
    record = correctness.check_spec(spec, "cpu", variant="eager")
    assert record["status"] == "ok", record


def test_a_kernel_that_differs_between_two_calls_is_found(monkeypatch):
    case = CASES["class_variance"]
    plain = case.plain
    calls = iter(range(100))

    def drifting(self, variant):
        call = plain(self, variant)
        return lambda x: tuple(output + next(calls) * 1e-7 for output in call(x))

    monkeypatch.setattr(case, "plain", drifting)
    record = correctness.check_spec(SMALL["class_variance"], "cpu", variant="eager")
    assert record["status"] == "unrepeatable"


def test_layouts_are_what_they_are_called():
    strided = CASES["class_variance"](Spec("class_variance", B=6, K=2, T=2, D=4, layout="strided"), "cpu")
    expanded = CASES["class_variance"](Spec("class_variance", B=6, K=2, T=2, D=4, layout="expanded"), "cpu")
    assert strided.leaves["features"].stride() == (16, 8, 2)
    assert expanded.leaves["features"].stride()[1] == 0
    assert expanded.leaves["features"].is_leaf


def record_of(spec, **seconds):
    """A case's record with these seconds for every direction of each variant."""
    figures = {
        variant.replace("_", "-"): {"status": "ok"} | {d: {"device": {"median": s}} for d in DIRECTIONS}
        for variant, s in seconds.items()
    }
    return {"name": spec.name, "variants": figures, "left_out": []}


def test_targets_are_judged_from_what_was_measured():
    variance = next(p.spec for p in PLANS if p.judged and p.spec.operator == "class_variance")
    read = next(p.spec for p in PLANS if p.judged and p.spec.operator == "gated_read")
    moved = CASES["class_variance"].cost(variance, "backward").bytes
    records = [
        record_of(variance, triton=moved / 4e12 / 0.82),
        record_of(read, triton=1e-5, padded_compiled=1.5e-5, flex_compiled=3e-5),
    ]
    judged = {(t["case"], t["target"]): t for t in cases.judge(records, CEILINGS)}
    fractions = {key[1].split()[0]: t for key, t in judged.items() if key[0] == variance.name}
    assert fractions["backward"]["reached"] is True
    assert fractions["backward"]["measured"] == pytest.approx(0.82)
    assert fractions["forward"]["reached"] is False
    of_read = [t for key, t in judged.items() if key[0] == read.name]
    assert of_read[0]["reached"] is False
    assert of_read[0]["fastest"] == "padded-compiled"
    assert of_read[0]["measured"] == pytest.approx(1.5)
    assert of_read[2]["measured"] == pytest.approx(1e-5 * 4e12 / CASES["gated_read"].cost(read, "both").bytes)
    unmeasured = [t for t in judged.values() if t["case"] not in (variance.name, read.name)]
    assert unmeasured
    assert all(t["reached"] is None and t["measured"] is None for t in unmeasured)


def test_a_missing_peer_is_not_beaten():
    record = record_of(SMALL["gated_read"], triton=1e-5, padded_compiled=1e-3)
    found = cases.times_faster(record, "of two", cases.NAMED_PEERS)
    assert found["measured"] == pytest.approx(100)
    assert found["reached"] is None
    assert found["missing"] == ["flex-compiled"]


def test_copies_move_three_times_the_cache_within_bounds():
    assert copies_for(call_bytes=1e9, cache_bytes=60e6) == 2
    assert copies_for(call_bytes=20e6, cache_bytes=60e6) == 9
    assert copies_for(call_bytes=1e3, cache_bytes=60e6) == 64


def test_quantiles_keep_every_sample():
    found = quantiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found["q20"], found["median"], found["q80"]) == pytest.approx((1.8, 3.0, 4.2))
    assert found["samples"] == [5.0, 1.0, 3.0, 2.0, 4.0]


def test_the_file_is_whole_after_every_addition(tmp_path):
    report = report_with(tmp_path)
    for number in range(3):
        report.add("left_out", f"case {number}")
        assert len(json.loads(report.path.read_text())["left_out"]) == number + 1
    assert [p.name for p in report.path.parent.iterdir()] == ["gpu.json"]


def test_a_whole_run_writes_the_file_and_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "SPECS", [SMALL["gated_read"]])
    plans = [Plan(spec, ("triton", "eager", "loop")) for spec in SMALL.values()]
    report = report_with(tmp_path, predictions=measure.predictions(plans, CEILINGS))
    options = command.parse(["--no-sanitizer"])
    failures = command.run(report, options, plans, "cpu", HostTimer(), 1000, lambda share=1.0: 1.0)
    assert failures == []
    data = json.loads(report.path.read_text())
    assert [case["name"] for case in data["cases"]] == [spec.name for spec in SMALL.values()]
    assert data["correctness"][0]["status"] == "ok"
    assert all(target["reached"] is None for target in data["targets"])
    text = table.text(report.data, ["something broke"])
    for expected in (*(spec.name for spec in SMALL.values()), "not measured", "1 failed:", "something broke"):
        assert expected in text
    assert max(len(line) for line in text.splitlines()) <= 160


def test_predictions_need_no_device_and_say_what_they_are(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    assert command.main(["--predict", "--only", "class_variance B4096", "--copy-rate", "1e12", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("PREDICTED, not measured")
    data = json.loads(out.read_text())
    name = "class_variance B4096 K100 T64 D128 fp32"
    assert data["predictions"][name]["forward"]["floor_seconds"] == pytest.approx(1.3425e-4, rel=1e-3)
    assert data["predictions"][name]["forward"]["bound_by"] == "bytes"
    assert data["cases"] == []


def test_without_a_device_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_lists_the_names(capsys):
    assert command.main(["--only", "no such case"]) == 2
    assert PLANS[0].spec.name in capsys.readouterr().err


def test_errors_are_told_without_folders():
    error = RuntimeError("cannot open /home/someone/lib/kernel.so: no such file\n  at line 3")
    assert describe(error) == "RuntimeError: cannot open kernel.so: no such file"


def test_sanitizer_is_absent_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.sanitize("memcheck", timeout=1) == {"tool": "memcheck", "status": "absent"}


def test_what_the_sanitizer_watches_runs():
    assert len(sanitize.run_kernels("cpu", "eager")) == len(sanitize.SPECS)
