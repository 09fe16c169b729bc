"""``docs/performance.md`` says what the committed files say, and ``not measured`` where they say nothing."""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is no installed package

import pytest
from matplotlib.image import imread

from benchmarks import performance_page
from benchmarks.gpu.cases import PLANS
from benchmarks.gpu.ceilings import ASSUMED
from benchmarks.gpu.picture import draw_sweep
from benchmarks.operators import CASES, DIRECTIONS
from benchmarks.operators.base import rate_of
from benchmarks.performance_page import DOCS, EXPECTATION, NOT_MEASURED, OPERATORS, RESULTS, VERSION
from benchmarks.roofline import draw_roofline

SPEC = next(plan.spec for plan in PLANS if plan.spec.operator == "gated_read" and plan.spec.dtype == "bf16")
RATES = {"copy": 4e12, "bf16": 8e14, "fp32": 5e13, "tf32": 4e14}


def ok(**seconds):
    """A variant's record with these times by direction."""
    past = {"past_the_cache": True, "times_floor": 1.25}
    return {"status": "ok"} | {d: {"device": {"median": s, "how": "graph replay"}, **past} for d, s in seconds.items()}


def run_of(variants, **more):
    """What ``python -m benchmarks.gpu`` has written after a single case."""
    return {
        "environment": {"device": "Some GPU", "driver": "123.45"},
        "ceilings": {name: {"rate": rate, "unit": "x/s"} for name, rate in RATES.items()},
        "correctness": [{"status": "ok"}],
        "sanitizer": [],
        "cases": [{"name": SPEC.name, "variants": variants, "left_out": []}],
        **more,
    }


@pytest.fixture
def results(tmp_path):
    """The files kept by hand, in a folder to which a test adds what was measured."""
    folder = tmp_path / "results"
    (folder / "gpu").mkdir(parents=True)
    for name in ("expected.json", "versions.json"):
        shutil.copy(RESULTS / name, folder)
    return folder


def page_of(results, **files):
    """The page after these were added: JSON by a path without its ending, such as ``**{"gpu/x": ...}``."""
    for name, content in files.items():
        (results / f"{name}.json").write_text(json.dumps(content))
    performance_page.write(results, results.parent)
    return (results.parent / "performance.md").read_text(encoding="utf-8")


def part(text, *titles):
    """What stands below the heading that these titles make."""
    return text.split(f"\n## {': '.join(titles)}\n", 1)[1].split("\n## ", 1)[0]


def rows_of(text):
    """The rows of a part's table, in cells, without its head."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_the_committed_page_is_what_the_committed_files_say(tmp_path):
    performance_page.write(RESULTS, tmp_path)
    drawn = (tmp_path / "performance.md").read_bytes()
    assert drawn == (DOCS / "performance.md").read_bytes(), (
        "run python -m benchmarks.performance_page, and commit docs/"
    )
    for picture in tmp_path.glob("*.png"):
        assert imread(DOCS / picture.name).std() > 0.01  # not blank


def test_without_a_run_every_case_has_a_floor_and_no_time(results):
    text = page_of(results)
    assert "Measured on" not in text
    for operator in OPERATORS:
        specs = [plan.spec for plan in PLANS if plan.spec.operator == operator]
        rows = rows_of(part(text, "Predicted for an H200", operator))
        assert [row[0] for row in rows[:: len(DIRECTIONS)]] == [spec.name.partition(" ")[2] for spec in specs]
        assert [row[1] for row in rows] == [*DIRECTIONS] * len(specs)
        assert {row[-1] for row in rows} == {NOT_MEASURED}
        floor, bound = CASES[operator].cost(specs[0], "both").floor(ASSUMED["copy"], ASSUMED[rate_of(specs[0].dtype)])
        assert float(rows[2][4]) == pytest.approx(1e6 * floor, rel=5e-3)
        assert rows[2][5] == bound
    assert {row[-1] for row in rows_of(part(text, "Predicted for an H200", "targets"))} == {NOT_MEASURED}
    assert {row[-2] for row in rows_of(part(text, "Expected before measuring"))} == {NOT_MEASURED}
    for title in ("Peak memory", "As sizes grow"):
        assert part(text, title).strip() == "Not measured."


def test_a_run_brings_its_device_its_rates_and_its_times(results):
    peers = {"padded-compiled": ok(forward=3e-5), "gathered-compiled": ok(forward=2.4e-5), "eager": ok(forward=2e-5)}
    absent = {"flex-compiled": {"status": "absent", "why": "no device of this kind"}}
    text = page_of(results, **{"gpu/some-gpu": run_of({"triton": ok(forward=1.2e-5), **peers, **absent})})
    assert "Predicted for" not in text
    section = part(text, "Measured on Some GPU")
    assert "- **driver**: 123.45" in section
    assert "- **copy rate**: 4.00 TB/s" in section
    row = rows_of(part(text, "Measured on Some GPU", SPEC.operator))[0]
    assert row[:2] == [SPEC.name.partition(" ")[2], "forward"]
    floor = 1e6 * CASES[SPEC.operator].cost(SPEC, "forward").bytes / RATES["copy"]
    assert row[4:] == [f"{floor:.1f}", "bytes", "12.0", "1.25", "2.00 gathered-compiled"]
    missing = part(text, "Measured on Some GPU", "without a time")
    assert f"- **{SPEC.name}, flex-compiled**: absent: no device of this kind" in missing
    assert f"- **{SPEC.name}, loop**: not run" in missing
    (expected,) = [r for r in rows_of(part(text, "Expected before measuring")) if r[:2] == [SPEC.name, "forward"]]
    assert expected[-2] == "12.0"


def test_a_kernel_that_was_wrong_has_no_time(results):
    variants = {"triton": {"status": "wrong", "why": "output 0: error 1"}, "padded-compiled": ok(forward=3e-5)}
    text = page_of(results, **{"gpu/some-gpu": run_of(variants)})
    row = rows_of(part(text, "Measured on Some GPU", SPEC.operator))[0]
    assert row[6:] == ["wrong", "–", "–"]
    assert "wrong: output 0: error 1" in text


def test_a_target_is_open_while_a_peer_has_no_time(results):
    variants = {"triton": ok(both=1e-5), "padded-compiled": ok(both=3e-5)}
    text = page_of(results, **{"gpu/some-gpu": run_of(variants)})
    rows = [row for row in rows_of(part(text, "Measured on Some GPU", "targets")) if row[0] == SPEC.name]
    assert rows[0][-2:] == ["3.00", "open without flex-compiled"]
    assert rows[-1][-1] == "reached"


def test_predictions_in_the_folder_are_no_run(results):
    text = page_of(results, **{"gpu/predicted": {"assumed_ceilings": RATES, "predictions": {}, "cases": []}})
    assert "Measured on" not in text


def test_a_sweep_is_drawn(results):
    sizes = {"axis": "tokens", "spec": SPEC.name, "B": 8, "K": 2, "D": 16, "variant": "triton"}
    sweep = [{**sizes, "T": tokens, "seconds": tokens * 1e-6} for tokens in (1, 2, 4)]
    text = page_of(results, **{"gpu/some-gpu": run_of({}, sweep=sweep)})
    assert "](sweep.png)" in part(text, "As sizes grow: Some GPU")
    assert imread(results.parent / "sweep.png").std() > 0.01


def test_growth_on_the_cpu_is_against_the_next_smaller_size(results):
    point = {"axis": "classes", "B": 64, "T": 1, "D": 16, "variant": "eager"}
    small, large = ({**point, "spec": f"K{K}", "K": K, "seconds": 1e-3 * (K - 2)} for K in (4, 12))
    sweep = {"environment": {"device": "CPU"}, "sweep": [small, large]}
    section = part(page_of(results, **{"cpu-sweep": sweep}), "As sizes grow: CPU")
    assert rows_of(section) == [["K4", "eager", "2 ms", "–", "–"], ["K12", "eager", "10 ms", "3", "5.00"]]
    assert imread(results.parent / "sweep-cpu.png").std() > 0.01


def test_peak_memory_has_a_row_a_variant(results):
    variants = {"triton": {"peak_bytes": 2.5e6, "saved_bytes": 1e3}, "eager": {"peak_bytes": 5e6, "saved_bytes": 4e6}}
    memory = {"environment": {"device": "cpu"}, "cases": [{"name": "a case", "variants": variants}]}
    section = part(page_of(results, memory=memory), "Peak memory")
    assert rows_of(section) == [
        ["a case", "triton", "2.50 MB", "1.00 kB"],
        ["a case", "eager", "5.00 MB", "4.00 MB"],
    ]
    assert "- **device**: cpu" in section


def test_resources_are_the_most_of_every_configuration():
    common = {"target": "sm90", "kernel": "some_kernel", "triton": "9.9"}
    rows = [
        {**common, "case": "a", "registers": "32", "shared_bytes": "2048", "spilled_bytes": "0"},
        {**common, "case": "b", "registers": "16", "shared_bytes": "4096", "spilled_bytes": "8"},
    ]
    assert performance_page.resources(rows).table.rows == [["some_kernel", "2", "32, 4 KB, 8 B"]]


GOOD = {
    "versions": dict.fromkeys(VERSION, "x") | {"verdict": "kept"},
    "expected": {"case": SPEC.name, "direction": "forward", "expected_us": [1, 2.5], "why": "x"},
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("versions", {"verdict": "maybe"}, "versions.json, entry 2: 'verdict' takes kept or dropped, got 'maybe'"),
        ("versions", {"outcome": " "}, "entry 2: 'outcome' takes text, got ' '"),
        ("versions", {"speed": "x"}, "entry 2: takes the fields kernel, .*, verdict, got kernel, .*, verdict, speed"),
        ("expected", {"case": "gated_read"}, "'case' takes the name of a case in .*PLANS, got 'gated_read'"),
        ("expected", {"expected_us": [2, 1]}, r"'expected_us' takes microseconds, or \[least, most\], got \[2, 1\]"),
        ("expected", {"expected_us": "3"}, "'expected_us' takes microseconds"),
        ("expected", {"expected_us": 0}, "'expected_us' takes microseconds"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, kind, change, message):
    path = tmp_path / f"{kind}.json"
    fields = {"versions": VERSION, "expected": EXPECTATION}[kind]
    path.write_text(json.dumps([GOOD[kind]]))
    assert performance_page.entries(path, fields) == [GOOD[kind]]
    path.write_text(json.dumps([GOOD[kind], GOOD[kind] | change]))
    with pytest.raises(ValueError, match=message):
        performance_page.entries(path, fields)


@pytest.mark.parametrize("draw", [lambda path: draw_roofline([], ASSUMED, path), lambda path: draw_sweep([], path)])
def test_nothing_to_draw_is_an_error(tmp_path, draw):
    with pytest.raises(ValueError, match="no"):
        draw(tmp_path / "x.png")
