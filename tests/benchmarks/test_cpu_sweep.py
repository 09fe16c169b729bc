"""``python -m benchmarks.cpu_sweep``, on batches that take no time."""

import json
import statistics

import pytest
from fake_clock import SMALL

from benchmarks import cpu_sweep


def test_every_point_has_the_median_of_its_rounds_for_both_variants(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu_sweep, "SWEEP", {"classes": [SMALL["surrogate"]]})
    cpu_sweep.main(["--rounds", "3", "--out", str(tmp_path / "sweep.json")])
    eager, loop = json.loads((tmp_path / "sweep.json").read_text())["sweep"]
    assert (eager["variant"], loop["variant"]) == ("eager", "loop")
    for point in (eager, loop):
        assert len(point["rounds"]) == 3
        assert min(point["rounds"]) > 0
        assert point["seconds"] == pytest.approx(statistics.median(point["rounds"]), abs=1e-6)
    assert f"{1e3 * loop['seconds']:.2f} ms" in capsys.readouterr().out
