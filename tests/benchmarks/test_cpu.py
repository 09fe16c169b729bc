"""What is measured without a GPU: memory that can be counted by hand, sizes, and the file that they are recorded in."""

import json
from dataclasses import replace

import pytest
import torch
from small import SMALL

from benchmarks import cpu, memory, sizes, sweep
from benchmarks.operators import CASES

SPEC = replace(SMALL["surrogate"], B=40, T=4, labels="spread")
SCALARS = 64  # bytes of the numbers that operators wrap as tensors
WAYS = [
    ((6, 2, 2), "flat", {"reduction": "none"}),
    ((6, 2, 2), "spatial, conv1x1 4", {"spatial": True, "reduction": "conv4"}),
]


def test_the_peak_is_what_lives_at_once():
    x = torch.randn(500, 400, requires_grad=True)

    def call():
        doubled = x.detach() * 2
        result = doubled.exp()  # two alive
        del doubled
        return result.sum(dim=0)  # and here one and a row

    assert memory.peak_bytes(call) == pytest.approx(2 * x.nbytes, abs=SCALARS)
    assert memory.peak_bytes(lambda: x.view(-1)) == pytest.approx(0, abs=SCALARS)  # what was there does not count
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


@pytest.mark.slow
def test_no_size_depends_on_what_kernels_write():
    case = CASES["surrogate"](SPEC, "cpu")
    features, *parameters = case.leaves.values()

    def saved():
        return memory.saved_bytes(lambda: case.build("triton")(features, *parameters), parameters)

    with memory.no_kernels():
        without = saved()
    assert without == saved()


def test_sizes_of_the_table_by_hand():
    def attention(width):
        return 25 * width**2 + 29 * width + 2

    by_hand = {
        (8, "flat"): (attention(392), [1, 392]),
        (8, "linear 128"): (attention(128) + 392 * 128, [1, 128]),
        (8, "conv1x1 4"): (attention(196) + 8 * 4, [1, 196]),
        (512, "flat"): (attention(25_088), [1, 25_088]),
        (512, "spatial, conv1x1 64"): (attention(64) + 512 * 64, [49, 64]),
    }
    assert {(way[0][0], way[1]): sizes.size_of(way) for way in sizes.WAYS}.items() >= by_hand.items()


def test_every_study_is_recorded_beside_the_others_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SPECS", [SPEC])
    monkeypatch.setattr(sizes, "WAYS", [*WAYS, (sizes.MAP, "flat", {"reduction": "none"})])
    monkeypatch.setattr(sizes, "BATCH", 20)
    monkeypatch.setattr(sweep, "SWEEP", {"classes": [SMALL["surrogate"]]})
    monkeypatch.setattr("benchmarks.interleaved.math.ceil", lambda _: 1)  # one call a turn
    for study in cpu.STUDIES:
        cpu.main([study, "--out", str(tmp_path / "new" / "cpu.json")])
    parts = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert {name: part["command"] for name, part in parts.items()} == {
        s: f"python -m benchmarks.cpu {s}" for s in cpu.STUDIES
    }
    assert {part["torch"] for part in parts.values()} == {torch.__version__}
    assert [row["variant"] for row in parts["memory"]["rows"]] == [*memory.VARIANTS]
    assert all(0 < row["saved_bytes"] < row["peak_bytes"] for row in parts["memory"]["rows"])
    *built, counted = parts["sizes"]["rows"]
    assert [row["tokens"] for row in built] == [[1, 24], [4, 4]]
    assert all(row["milliseconds"] > 0 and row["peak_mib"] > 20 * 24 * 4 / 2**20 for row in built)
    assert (counted["parameters"], counted["milliseconds"]) == (15_735_921_154, None)
    assert [(row["variant"], len(row["rounds"])) for row in parts["sweep"]["rows"]] == [("eager", 5), ("loop", 5)]
    assert "too large to build" in capsys.readouterr().out
