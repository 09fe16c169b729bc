"""The report of ``python -m benchmarks.gpu``, everything but the clock: a device is needed only to time."""

import json

import pytest
import torch
from fake_clock import CEILINGS, SMALL, HostTimer, record_of, report_with

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, correctness, measure, sanitize, sweep, table, training
from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.gpu.errors import describe
from benchmarks.gpu.timing import copies_for, quantiles
from benchmarks.operators import CASES, DIRECTIONS, Spec
from benchmarks.operators.base import errors_of

INTERPRETED_SLOWLY = ("slot_attention", "surrogate")
POINT = {"axis": "classes", "spec": SMALL["surrogate"].name, "K": 4, "variant": "triton", "seconds": 1e-4}
TRAINING = {
    "name": "training step",
    "backend": "triton",
    "step_seconds": {"none": {"median": 5e-3}, "attention": {"median": 5.2e-3}},
    "added": {"attention": {"q1": 0.03, "median": 0.04, "q3": 0.05}},
    "absent": {"attention captured": "no graph here"},
}

every_operator = pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL.keys())


def measured(spec, names, **more):
    return measure.measure_case(
        Plan(spec), names, "cpu", HostTimer(), CEILINGS, 1000, more.get("seconds_left", lambda: 1.0)
    )


def test_class_variance_reads_once_and_then_reads_and_writes_once():
    spec = Spec("class_variance", B=4096, K=100, T=64, D=128, dtype="bf16")
    features, order = 4096 * 8192 * 2, 4096 * 8
    case = CASES["class_variance"]
    assert case.cost(spec, "forward").bytes == features + order
    assert case.cost(spec, "backward").bytes == 2 * features + order
    assert case.cost(spec, "both").bytes == 3 * features + 2 * order


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operator", ["slot_attention", "gated_read", "cross_attention"])
def test_attention_bytes_are_those_of_its_tensors(operator, dtype):
    spec = Spec(operator, B=12, K=3, T=2, D=32, S=3, H=2, dtype=dtype)
    case = CASES[operator](spec, "cpu")
    inputs = sum(leaf.nbytes for leaf in case.leaves.values())
    (output,) = case.build("eager")(*case.leaves.values())
    moved = inputs + output.nbytes + case.groups.order.nbytes
    assert case.cost(spec, "forward").bytes == moved
    assert case.cost(spec, "backward").bytes == moved + inputs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_surrogate_bytes_are_those_of_features_parameters_and_draw(dtype):
    spec = Spec("surrogate", B=12, K=3, T=2, D=32, S=3, H=2, dtype=dtype)
    case = CASES["surrogate"](spec, "cpu")
    inputs = sum(leaf.nbytes for leaf in case.leaves.values())
    read = inputs + case.noise.nbytes + case.labels.nbytes
    assert case.cost(spec, "forward").bytes == read
    assert case.cost(spec, "backward").bytes == read + inputs


def test_slot_attention_counts_products_of_tokens_and_of_slot_rows():
    spec = Spec("slot_attention", B=100, K=5, T=2, D=64, S=4)
    logits, rows = 2 * 200 * 4 * 64, 2 * 11 * 20 * 64**2
    assert CASES["slot_attention"].cost(spec, "forward").operations == 3 * (2 * logits + rows)
    assert CASES["slot_attention"].cost(spec, "backward").operations == 3 * (2 * (2 * logits + rows) + logits)


def test_the_surrogate_has_the_operations_of_its_operators():
    def operations(operator):
        return CASES[operator].cost(Spec(operator, B=64, K=3, T=4, D=32), "both").operations

    parts = ("slot_attention", "cross_attention", "class_variance")
    assert operations("surrogate") == sum(map(operations, parts))


def test_the_dtype_of_a_surrogate_is_that_of_its_features_alone():
    case = CASES["surrogate"](Spec("surrogate", B=12, K=3, T=4, D=32, dtype="bf16"), "cpu")
    features, *parameters = case.leaves.values()
    assert (features.dtype, features.shape) == (torch.bfloat16, (12, 32, 1, 4))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert set(case.leaves) == {"features", *dict(case.surrogate("eager").named_parameters())}


def test_a_gradient_that_cancels_is_measured_against_the_largest():
    exact = {"output 0": torch.ones(2), "gradient of a": torch.full((4,), 3.0), "gradient of b": torch.tensor([1e-16])}
    found = exact | {"gradient of b": torch.tensor([6e-6])}
    assert errors_of(found, exact)["gradient of b"] == pytest.approx(1e-6)
    found, exact = exact | {"gradient of b": torch.tensor([9e-6])}, exact | {"gradient of b": torch.tensor([6e-6])}
    assert errors_of(found, exact)["gradient of b"] == pytest.approx(3e-6 / 6e-3)  # a single number


def test_a_gradient_of_several_numbers_is_measured_against_less_of_the_largest():
    exact = {"gradient of a": torch.full((4,), 3.0), "gradient of b": torch.tensor([6e-6, 0.0])}
    found = exact | {"gradient of b": torch.tensor([9e-6, 0.0])}
    assert errors_of(found, exact)["gradient of b"] == pytest.approx(3e-6 / 6e-4)


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
    if spec.operator in INTERPRETED_SLOWLY:
        names.remove("triton")
    record = measured(spec, names)
    statuses = {name: found["status"] for name, found in record["variants"].items()}
    assert statuses == dict.fromkeys(names, "ok")
    for name in names:
        for direction in DIRECTIONS:
            assert record["variants"][name][direction]["device"]["median"] > 0
    assert measure.failures_of(record) == []


@pytest.mark.parametrize("operator", INTERPRETED_SLOWLY)
def test_kernels_pass_their_check(operator):
    case = CASES[operator](SMALL[operator], "cpu")
    verdict = case.check("triton", case.build("triton"))
    assert verdict.passed, verdict


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


def surrogate_record(**more):
    """Seconds of the surrogate at B 128, K 10, T 1, where 10 times the loop and 2 times padded-compiled are wanted."""
    spec = next(p.spec for p in PLANS if p.spec.operator == "surrogate" and p.spec.B == 128)
    record = record_of(spec, triton=1e-4, loop=2e-3, padded_compiled=5e-4, padded=9e-4)
    for variant, figures in more.items():
        record["variants"][variant.replace("_", "-")]["both"] |= figures
    judged = {t["target"]: t for t in cases.judge([record], CEILINGS) if t["case"] == spec.name}
    return list(judged.values())


def test_the_surrogate_is_held_against_loop_padded_batch_and_its_memory():
    peaks = {name: {"peak_bytes": size} for name, size in (("triton", 30), ("padded", 100), ("padded_compiled", 80))}
    loop, padded, memory = surrogate_record(**peaks)
    assert (loop["measured"], loop["reached"]) == (pytest.approx(20), True)
    assert (padded["measured"], padded["reached"]) == (pytest.approx(5), True)
    assert (memory["measured"], memory["reached"]) == (pytest.approx(30 / 80), False)


def test_a_peer_may_be_quicker_without_a_graph_than_with_one():
    wall = {"triton": {"wall": {"median": 3e-4}}, "padded_compiled": {"wall": {"median": 1.5e-4}}}
    _, padded, memory = surrogate_record(**wall)
    assert (padded["measured"], padded["reached"]) == (pytest.approx(1.5), False)
    assert padded["launched"] == pytest.approx(0.5)
    assert memory["reached"] is None


def test_a_training_step_may_grow_by_a_twentieth():
    added = {"centroid": {"median": 0.08}, "centroid captured": {"median": 0.03}}
    verdicts = [t["reached"] for t in cases.judge_training({"name": "step", "backend": "triton", "added": added})]
    assert verdicts == [False, True, None, None]
    of_eager = cases.judge_training({"name": "step", "backend": "eager", "added": added})
    assert [t["reached"] for t in of_eager] == [None] * 4
    assert [t["measured"] for t in cases.judge_training({"name": "step"})] == [None] * 4


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
    monkeypatch.setattr(sweep, "SWEEP", {"classes": [SMALL["surrogate"]]})
    monkeypatch.setattr(sweep, "measure_point", lambda *_: (dict(POINT), []))
    monkeypatch.setattr(training, "measure_training", lambda device, rounds: dict(TRAINING))
    plans = [Plan(spec, ("eager", "loop") if name in INTERPRETED_SLOWLY else ("triton", "eager", "loop"))
             for name, spec in SMALL.items()]  # fmt: skip
    report = report_with(tmp_path, predictions=measure.predictions(plans, CEILINGS))
    options = command.parse(["--no-sanitizer"])
    failures = command.run(report, options, plans, "cpu", HostTimer(), 1000, lambda share=1.0: 1.0)
    assert failures == []
    data = json.loads(report.path.read_text())
    assert [case["name"] for case in data["cases"]] == [spec.name for spec in SMALL.values()]
    assert data["correctness"][0]["status"] == "ok"
    assert data["sweep"] == [POINT]
    assert data["training"] == TRAINING
    assert {target["reached"] for target in data["targets"] if target["case"] != TRAINING["name"]} == {None}
    text = table.text(report.data, ["something broke"])
    for expected in (*(spec.name for spec in SMALL.values()), "not measured", "1 failed:", "something broke", "+4.0%"):
        assert expected in text
    assert max(len(line) for line in text.splitlines()) <= 160


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
