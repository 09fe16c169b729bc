"""``python -m benchmarks.memory``: what it counts, on cases that can be counted by hand."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from fake_clock import SMALL

from benchmarks import memory
from benchmarks.operators import CASES

SPEC = replace(SMALL["surrogate"], B=40, T=4, labels="spread")
SCALARS = 64  # bytes of the numbers that operators wrap as tensors


def test_the_peak_is_what_lives_at_once():
    x = torch.randn(500, 400)

    def call():
        doubled = x * 2
        result = doubled.exp()  # two alive
        del doubled
        return result.sum(dim=0)  # and here one and a row

    assert memory.peak_bytes(call) == pytest.approx(2 * x.nbytes, abs=SCALARS)


def test_what_a_call_returns_counts_and_what_was_there_does_not():
    x = torch.randn(500, 400)
    assert memory.peak_bytes(lambda: x[:, ::2].clone()) == pytest.approx(x.nbytes / 2, abs=SCALARS)
    assert memory.peak_bytes(lambda: x.view(-1)) == pytest.approx(0, abs=SCALARS)


def test_a_backward_counts_too():
    x = torch.randn(500, 400, requires_grad=True)
    # exp keeps its result; its gradient and the upstream gradient, expanded from a sum, are no more than two at a time.
    peak = memory.peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x))
    assert peak == pytest.approx(2 * x.nbytes, abs=SCALARS)


def test_saved_storages_count_once_and_parameters_do_not():
    x, weight = torch.randn(30, 20), torch.randn(20, 20, requires_grad=True)

    def call():
        hidden = (x @ weight).exp()  # keeps x; keeps its own result
        return hidden * hidden.t().reshape(hidden.shape)  # keeps that again, and a copy

    assert memory.saved_bytes(call, [weight]) == x.nbytes + 2 * 30 * 20 * 4
    assert memory.saved_bytes(call, [weight, x]) == 2 * 30 * 20 * 4


def test_every_variant_is_measured():
    found = memory.record_of(SPEC)["variants"]
    assert list(found) == list(memory.VARIANTS)
    for sizes in found.values():
        assert 0 < sizes["saved_bytes"] < sizes["peak_bytes"]


def test_no_size_depends_on_what_kernels_write():
    case = CASES["surrogate"](SPEC, "cpu")
    features, *parameters = case.leaves.values()

    def saved():
        return memory.saved_bytes(lambda: case.build("triton")(features, *parameters), parameters)

    with memory.no_kernels():
        without = saved()
    assert without == saved()


def test_launches_run_again_afterwards():
    module = importlib.import_module("cem_kernels.variance.triton")
    utilities = importlib.import_module("cem_kernels.triton_utils")
    with memory.no_kernels():
        assert module.launch is not utilities.launch
    assert module.launch is utilities.launch


def test_the_file_names_versions_and_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SPECS", [SPEC])
    memory.main(["--out", str(tmp_path / "new" / "memory.json")])
    data = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert data["environment"]["torch"] == torch.__version__
    assert [case["name"] for case in data["cases"]] == [SPEC.name]
    assert set(data["cases"][0]["variants"]["loop"]) == {"peak_bytes", "saved_bytes"}
    assert SPEC.name in capsys.readouterr().out
