"""``pytest benchmarks/`` and the page that shows what it found: nothing wrong is timed, and both say the same."""

import shutil
from types import SimpleNamespace

import pytest
from matplotlib.image import imread
from small import SMALL

from benchmarks import performance_page, runner, table
from benchmarks.cases import SPECS, rivals_of
from benchmarks.gpu import model
from benchmarks.operators import CASES


def test_a_wrong_competitor_is_an_error_and_gets_no_time(monkeypatch):
    spec = SMALL["class_variance"]
    right = CASES["class_variance"].peer
    off = lambda case, name: lambda x: tuple(1.01 * loss for loss in right(case, name)(x))  # noqa: E731
    monkeypatch.setattr(CASES["class_variance"], "peer", off)
    with pytest.raises(AssertionError, match=r"padded is wrong: .*: error 0\.01, allowed 0\.0001"):
        runner.Runner(spec).run(None, "eager", "forward")


def test_a_row_names_the_strongest_competitor_and_the_loop_and_fits():
    spec = SMALL["surrogate"]
    benchmark = SimpleNamespace(enabled=True, extra_info={}, pedantic=lambda play, **_: play())
    runner.Runner(spec).run(benchmark, "eager", "both")
    assert benchmark.extra_info["seconds"].keys() == {"eager", "padded", "loop"}
    times = {"eager": [1.0, 1.0, 2.0], "loop": [8.0, 8.0, 16.0], "padded": [3.0, 2.0, 4.0]}
    row = runner.compared(times, "eager")
    assert (row["strongest"], row["times"]["median"], row["times_loop"]["median"]) == ("padded", 2.0, 8.0)
    widest = {"case": max((s.name for s in SPECS), key=len), "direction": "backward", **row}
    widest |= {"own": "loop", "strongest": "index-add-compiled", "seconds": {"loop": 99.0, "index-add-compiled": 99.0}}
    assert max(len(line) for text in table.lines([widest]) for line in text.splitlines()) <= 140


def test_what_compiles_meets_what_compiles():
    assert rivals_of(SMALL["slot_attention"], "eager") == ["padded", "loop"]
    assert rivals_of(SMALL["slot_attention"], "eager-compiled") == ["padded-compiled"]


def test_the_committed_page_is_what_the_committed_files_say(tmp_path):
    shutil.copy(performance_page.DOCS / "performance.md", tmp_path)
    performance_page.write(docs=tmp_path)
    drawn, committed = ((folder / "performance.md").read_text() for folder in (tmp_path, performance_page.DOCS))
    assert drawn == committed, "run python -m benchmarks.performance_page, and commit docs/"
    assert imread(performance_page.DOCS / "sweep-cpu.png").std() > 0.01  # not blank


def test_a_device_brings_its_times_beside_what_was_predicted_and_its_targets():
    row = model.read()[0]
    figure = {"device": {"median": 2e-6 * row["microseconds"]}}
    records = [{"kind": "time", "name": row["case"], row["direction"]: figure}]
    targets = [{"target": "be fast", "measured": 1.25, "reached": True}]
    text = performance_page.device({"environment": {"device": "Some GPU"}, "records": records, "targets": targets})
    assert "Measured on Some GPU" in text
    assert (
        f"| {row['case']} | forward | {row['microseconds']:.0f} | {2 * row['microseconds']:.0f} | 2.00 | REASON? |"
        in text
    )
    assert "| be fast | 1.25 | reached |" in text


def test_resources_are_the_most_of_every_version_and_a_spill_is_told():
    common = {"kernel": "k", "triton": "9.9", "shared_bytes": "2048"}
    rows = [
        {"target": target, "case": case, "registers": registers, "spilled_bytes": spilled, **common}
        for target in performance_page.TARGETS
        for case, registers, spilled in (("a", "32", "0"), ("b", "16", "8"))
    ]
    assert "| `k` | 2 | 32, 2 KB, 8 B spilled |" in performance_page.needs(rows)
