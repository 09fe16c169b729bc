"""``python -m benchmarks.sizes``, on maps that take no time, and the full table's sizes by hand."""

import json
import statistics

import pytest
import torch

from benchmarks import sizes

SHAPE = (6, 2, 2)
SHRUNK = [
    (SHAPE, "flat", {"reduction": "none"}),
    (SHAPE, "linear 5", {"reduction": "linear5"}),
    (SHAPE, "conv1x1 3", {"reduction": "conv3"}),
    (SHAPE, "spatial", {"spatial": True}),
    (SHAPE, "spatial, conv1x1 4", {"spatial": True, "reduction": "conv4"}),
]


def attention(width):
    """Parameters of both attentions at this width, counted by hand."""
    return 25 * width**2 + 29 * width + 2


@pytest.mark.parametrize("way", SHRUNK, ids=lambda way: way[1])
def test_what_is_counted_is_what_is_built(way):
    built, seen = sizes.surrogate_of(way), []
    parameters, tokens = sizes.size_of(way)
    assert parameters == sum(parameter.numel() for parameter in built.parameters())
    built.slot_attention.register_forward_pre_hook(lambda _, arguments: seen.append(list(arguments[0].shape)))
    built(torch.randn(4, *SHAPE), torch.tensor([0, 0, 1, 1]))
    assert seen == [[4, *tokens]]


def test_sizes_of_the_table_by_hand():
    found = {(shape[0], name): sizes.size_of((shape, name, options)) for shape, name, options in sizes.WAYS}
    assert found == {
        (8, "flat"): (attention(392), [1, 392]),
        (8, "linear 128"): (attention(128) + 392 * 128, [1, 128]),
        (8, "conv1x1 4"): (attention(196) + 8 * 4, [1, 196]),
        (8, "spatial"): (attention(8), [49, 8]),
        (512, "flat"): (attention(25_088), [1, 25_088]),
        (512, "linear 128"): (attention(128) + 25_088 * 128, [1, 128]),
        (512, "conv1x1 8"): (attention(392) + 512 * 8, [1, 392]),
        (512, "spatial"): (attention(512), [49, 512]),
        (512, "spatial, conv1x1 64"): (attention(64) + 512 * 64, [49, 64]),
    }


def test_every_way_has_the_median_of_its_rounds_and_a_peak(monkeypatch):
    monkeypatch.setattr(sizes, "WAYS", SHRUNK)
    rows = sizes.measure(rounds=3, at_least=0.0)
    assert [row["way"] for row in rows] == [name for _, name, _ in SHRUNK]
    for row in rows:
        assert row["features"] == list(SHAPE)
        assert len(row["rounds"]) == 3
        assert min(row["rounds"]) > 0
        assert row["milliseconds"] == statistics.median(row["rounds"])
        assert row["peak_mib"] > sizes.BATCH * 24 * 4 / 2**20  # of which a gradient


def test_the_gradient_reaches_every_sample():
    for way in SHRUNK:
        gradient = sizes.step_of(way)()
        assert gradient.shape == (sizes.BATCH, *SHAPE)
        assert gradient.isfinite().all()
        assert gradient.flatten(1).ne(0).any(dim=1).all()


def test_what_is_too_large_is_counted_and_not_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sizes, "WAYS", [(sizes.MAP, "flat", {"reduction": "none"})])
    monkeypatch.setattr(sizes, "step_of", lambda way: pytest.fail("built"))
    sizes.main(["--rounds", "1", "--out", str(tmp_path / "sizes.json")])
    (row,) = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    assert row["parameters"] == 15_735_921_154
    assert (row["milliseconds"], row["rounds"], row["peak_mib"]) == (None, [], None)
    assert "too large to build" in capsys.readouterr().out


def test_the_command_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sizes, "WAYS", SHRUNK[-1:])
    sizes.main(["--rounds", "2", "--out", str(tmp_path / "new" / "sizes.json")])
    written = json.loads((tmp_path / "new" / "sizes.json").read_text())
    assert written["environment"]["device"] == "CPU"
    assert (written["batch"], written["classes"]) == (128, 10)
    (row,) = written["rows"]
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert printed == [
        "6×2×2", "spatial,", "conv1x1", "4", "4×4", "542", f"{row['milliseconds']:.2f}", f"{row['peak_mib']:.2f}"
    ]  # fmt: skip
