"""The cases that benchmarks measure: what they must move and compute, and the check that stands before every clock."""

import pytest
import torch
from fake_device import setting
from small import SMALL

from benchmarks.check import errors_of
from benchmarks.gpu.cases import CHECKS
from benchmarks.gpu.jobs import Job, Performer
from benchmarks.operators import CASES, Spec

SLOWLY_INTERPRETED = ("slot_attention", "cross_attention", "surrogate")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operator", SMALL)
def test_bytes_are_those_of_inputs_outputs_and_index(operator, dtype):
    spec = Spec(operator, B=12, K=3, T=2, D=32, S=3, H=2, dtype=dtype)
    case = CASES[operator](spec, "cpu")
    inputs = sum(leaf.nbytes for leaf in case.leaves.values())
    index = case.labels.nbytes
    written = index
    if operator == "surrogate":
        written += case.noise.nbytes
    elif "variance" not in operator:
        written += case.build("eager")(*case.leaves.values())[0].nbytes
    # Of which one a centroid.
    statistics = 4 * spec.K * spec.T * spec.D * {"centroid_variance": 1, "slot_variance": spec.S}.get(operator, 0)
    assert case.cost(spec, "forward").bytes == inputs + written + 5 * statistics
    assert case.cost(spec, "backward").bytes == 2 * inputs + written + statistics
    assert case.cost(spec, "both").bytes == 3 * inputs + 2 * written + 6 * statistics


def test_operations_are_products_of_tokens_and_of_slot_rows_each_done_once_in_the_cheaper_order():
    spec = Spec("slot_attention", B=100, K=5, T=2, D=64, S=4)
    logits, rows = 2 * 200 * 4 * 64, 2 * 11 * 20 * 64**2
    assert CASES["slot_attention"].cost(spec, "forward").operations == 3 * (2 * logits + rows)
    assert CASES["slot_attention"].cost(spec, "backward").operations == 3 * (2 * (2 * logits + rows) + logits)
    many = CASES["gated_read"].cost(Spec("gated_read", B=1024, K=10, T=64, D=128), "forward")
    assert many.operations == 4 * 65536 * 128 * 32 + 8 * 80 * 128**2  # projections absorbed
    few = CASES["gated_read"].cost(Spec("gated_read", B=8, K=100, T=1, D=128), "forward")
    assert few.operations == 4 * 8 * 128 * 128 + 4 * 8 * 8 * 128 + 4 * 800 * 128**2

    def operations(operator):
        return CASES[operator].cost(Spec(operator, B=64, K=3, T=4, D=32), "both").operations

    assert operations("surrogate") == sum(map(operations, ("slot_attention", "cross_attention", "class_variance")))


@pytest.mark.parametrize(("shape", "share"), [((1,), 1e-3), ((2,), 1e-4)], ids=["a single number", "several"])
def test_a_gradient_that_cancels_is_measured_against_a_share_of_the_largest(shape, share):
    exact = {"output 0": torch.ones(2), "gradient of a": torch.full((4,), 3.0), "gradient of b": torch.zeros(shape)}
    vanishing, nearly = torch.zeros(shape), torch.zeros(shape)
    vanishing[0], nearly[0] = 6e-6, 9e-6
    assert errors_of(exact | {"gradient of b": vanishing}, exact)["gradient of b"] == pytest.approx(1e-6)
    exact = exact | {"gradient of b": vanishing}
    assert errors_of(exact | {"gradient of b": nearly}, exact)["gradient of b"] == pytest.approx(3e-6 / (6 * share))


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=n, marks=[pytest.mark.slow] * (n in SLOWLY_INTERPRETED)) for n, s in SMALL.items()]
)
def test_kernels_pass_their_check(spec):
    case = CASES[spec.operator](spec, "cpu")
    verdict = case.check("triton", case.build("triton"))
    assert verdict.passed, verdict


@pytest.mark.slow
def test_the_padded_batch_compiled_has_the_gradient_of_the_centroids_that_it_has_moved():
    case = CASES["centroid_variance"](SMALL["centroid_variance"], "cpu")
    verdict = case.check("padded-compiled", case.build("padded-compiled"))
    assert verdict.passed, verdict


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("variant", ["eager", "loop"])
def test_what_is_a_thousandth_off_or_not_a_number_never_passes(variant, factor):
    case = CASES["class_variance"](SMALL["class_variance"], "cpu")
    call = case.build(variant)
    assert case.check(variant, call).passed
    assert not case.check(variant, lambda x: (call(x)[0], factor * call(x)[1])).passed


@pytest.mark.parametrize("variant", ["eager", "padded"])
def test_running_centroids_that_are_not_moved_are_found(variant):
    case = CASES["centroid_variance"](SMALL["centroid_variance"], "cpu")
    call = case.build(variant)

    def still(features):
        losses = call(features)
        case.running, case.replaced = (type(case.start)(*map(torch.clone, case.start)) for _ in range(2))
        return losses

    verdict = case.check(variant, still)
    assert not verdict.passed
    assert verdict.worst in ("centroids", "variances", "batches")


def cheap(spec):
    return spec.B < 500 and spec.D < 512 and (spec.dtype == "fp32" or spec.T * spec.D < 1024)


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.name, marks=[] if cheap(s) else pytest.mark.slow) for s in CHECKS]
)
def test_eager_passes_the_checks_that_kernels_have_to_pass(spec):
    record = Performer(setting(repeats=1)).check(Job("check", spec.name, 1, spec, "eager"))
    assert record["status"] == "ok", record


def test_a_kernel_that_differs_between_two_calls_is_found(monkeypatch):
    case = CASES["class_variance"]
    plain, calls = case.plain, iter(range(100))

    def drifting(self, variant):
        call = plain(self, variant)
        return lambda x: tuple(output + next(calls) * 1e-7 for output in call(x))

    monkeypatch.setattr(case, "plain", drifting)
    spec = SMALL["class_variance"]
    record = Performer(setting()).check(Job("check", spec.name, 1, spec, "eager"))
    assert (record["status"], record["why"]) == ("unrepeatable", "output 0, output 1 at repeat 1")


def test_memory_that_nobody_has_written_is_found(monkeypatch):
    case = CASES["class_variance"]
    plain = case.plain

    def unwritten(self, variant):
        call = plain(self, variant)
        return lambda x: tuple(output + 0 * torch.empty(()) for output in call(x))

    monkeypatch.setattr(case, "plain", unwritten)
    spec = SMALL["class_variance"]
    record = Performer(setting()).check(Job("check", spec.name, 1, spec, "eager"))
    assert record["status"] == "wrong"
