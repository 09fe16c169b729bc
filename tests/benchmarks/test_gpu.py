"""``python -m benchmarks.gpu``, everything but the clock: a device is needed only to time."""

import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from fake_device import CENTROID, TINY, FakeTimer, setting
from small import SMALL

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import commands, environment, jobs, model, pack
from benchmarks.gpu.cases import PLANS, Plan
from benchmarks.gpu.jobs import Job, Performer
from benchmarks.gpu.report import Report, describe, text
from benchmarks.gpu.targets import judge
from benchmarks.gpu.timing import copies_for
from benchmarks.operators import CASES, DIRECTIONS
from cem import attack, compare, train

GB = {"copy": 4e12, "bf16": 8e14, "fp32": 5e13}


def performed(spec, variant="eager", kind="time", **options):
    return Performer(setting(**options))(Job(kind, spec.name, 1, spec, variant))


def reported(tmp_path, *records, keep=False):
    report = Report(tmp_path / "new" / "gpu.json", keep)
    report.set(environment={"device": "Some GPU"})
    for record in records:
        report.add({"variant": "", "status": "ok", "took": 1.0, "why": "", **record})
    return report


def timed(spec, seconds):
    """A record of a case, every direction of which takes these seconds."""
    record = {
        "kind": "time",
        "name": spec.name,
        "variant": "triton",
        "wall": {"median": seconds},
        "peak_bytes": 1 << 20,
    }
    for direction in DIRECTIONS:
        moved = CASES[spec.operator].cost(spec, direction).bytes
        record[direction] = {"device": {"median": seconds}, "how": "graph", "bytes": moved}
    return record


def compared(spec, **times):
    """Records of competitors that take so many times our time."""
    figures = {"both": {"device": {"median": 1e-3}, "how": "events: why"}, "wall": {"median": 1e-3}, "peak_bytes": 1}
    record = {"kind": "compare", "name": spec.name, **figures}
    kinds = {peer: {"by_order": [found] * 2, "launched": found, "quickest": found} for peer, found in times.items()}
    return [{**record, "variant": peer.replace("_", "-"), "times": found} for peer, found in kinds.items()]


def test_every_operator_is_planned_under_names_of_their_own_and_checked_before_it_is_timed():
    assert {plan.spec.operator for plan in PLANS} == set(CASES)
    assert len({plan.spec.name for plan in PLANS}) == len(PLANS)
    first, second, third = jobs.phases(jobs.Setting()).values()
    checked = {(job.spec, job.variant) for job in first if job.kind == "check"}
    compiled = {(job.spec, job.variant) for job in [*second, *third] if job.variant.endswith(("compiled", "triton"))}
    assert compiled <= checked
    assert {job.spec.operator for job in first if job.kind == "check" and "holes" in job.name} == set(CASES)
    everything = [(job.kind, job.name, job.variant) for job in [*first, *second, *third]]
    assert len(set(everything)) == len(everything)


def test_the_plan_says_what_each_phase_does_and_fits_its_time(capsys):
    assert command.main(["--plan"], jobs.Setting()) == 0
    lines = capsys.readouterr().out
    said = r"phase \d: .*\n  (\d+) s are expected, and it is over at (\d+) s"
    phases = [tuple(map(int, found)) for found in re.findall(said, lines)]
    total, budget = map(int, re.search(r"expected: (\d+) of (\d+) s", lines).groups())
    assert total <= budget == 480
    assert [over_at for _, over_at in phases] == [150, 375, 465]
    assert all(sum(expected for expected, _ in phases[: n + 1]) <= phases[n][1] for n in range(3))


def test_lines_of_commands_are_ones_that_the_commands_take(tmp_path):
    """A run to resume or to attack need not be there to read the other options."""
    parsers = {"train": train.parse, "attack": attack.parse, "compare": compare.parse}
    lines = "\n".join(script.lines for script in commands.COMMANDS).replace("$OUT", str(tmp_path))
    found = re.findall(r"\$PYTHON -m cem\.(\w+) ([^&\n]*)", lines)
    assert {name for name, _ in found} == set(parsers)
    for name, words in found:
        if "--resume" not in words:
            assert parsers[name](words.replace("--capture", "--no-capture").split())


def test_copies_move_three_times_the_cache_within_bounds():
    assert [copies_for(call_bytes=size, cache_bytes=60e6) for size in (1e9, 20e6, 1e3)] == [2, 9, 64]


def test_errors_are_told_without_folders():
    error = RuntimeError("cannot open /home/someone/lib/kernel.so: no such file\n  at line 3")
    assert describe(error) == "RuntimeError: cannot open kernel.so: no such file"


@pytest.mark.parametrize("kind", ["time", "compare", "sweep", "profile"])
def test_a_wrong_variant_gets_no_time_and_a_broken_one_says_why(monkeypatch, kind):
    plain = CASES["class_variance"].plain

    def sabotaged(self, variant):
        call = plain(self, variant)
        if variant == "padded":
            return lambda x: tuple(1.001 * output for output in call(x))
        return lambda x: (_ for _ in ()).throw(RuntimeError("out of memory"))

    monkeypatch.setattr(CASES["class_variance"], "plain", sabotaged)
    wrong, broken = (performed(SMALL["class_variance"], variant, kind) for variant in ("padded", "index-add"))
    assert (wrong["status"], broken["status"]) == ("error", "error")
    assert wrong["why"].startswith("ArithmeticError: padded is wrong: ")
    assert broken["why"] == "RuntimeError: out of memory"
    assert not {"both", "kernels"} & {*wrong, *broken}


@pytest.mark.parametrize(("kind", "found"), [("sweep", "wall"), ("profile", "kernels")])
def test_points_of_sweeps_and_profiles_are_figures_that_a_file_can_hold(tmp_path, kind, found):
    record = performed(SMALL["surrogate"], kind=kind)
    assert record[found], record
    assert "µs" in text(reported(tmp_path, {"kind": kind, "name": "tokens: x", **record}), [])


def test_a_competitor_is_timed_between_two_times_of_ours(monkeypatch):
    """On a clock by which ours takes 2 s and then 4 s, and 8 s with launches; theirs 6 s, 6 s and 3 s."""
    order = []

    class Clock(FakeTimer):
        def samples(self, play, calls=1):
            order.append(play.how)
            return [{"graph": 2.0 * order.count("graph"), "theirs": 6.0}[play.how]] * 3

        def play(self, steps, uncapturable=None):
            return super().play(steps)._replace(how="theirs" if uncapturable else "graph")

        def wall(self, play):
            return [8.0 if play.how == "graph" else 3.0]

    monkeypatch.setattr(CASES["class_variance"], "uncapturable", {"padded": "it is theirs"})
    record = performed(TINY, "padded", "compare", timer=Clock)
    assert order == ["graph", "theirs", "theirs", "graph"]
    assert record["times"] == {"by_order": [3.0, 1.5], "launched": 3 / 8, "quickest": 1.0}


@pytest.mark.parametrize("broken", [(), ("attention captured",), ("slots", "slots captured")], ids=str)
def test_training_steps_are_timed_without_with_and_captured_as_far_as_they_run(broken):
    def make(surrogate, *, captured, **options):
        if f"{surrogate}{' captured' * captured}" in broken:
            raise RuntimeError("no graph")
        assert torch.backends.cudnn.allow_tf32  # as a training has it
        return lambda: torch.tensor(False)

    found = jobs.measure_training("cpu", rounds=3, steps=1, make=make)
    ways = [way for way in ("slots", "slots captured", "attention", "attention captured") if way not in broken]
    assert (list(found["step_seconds"]), list(found["added"])) == (["none", *ways], ways)
    assert found["broken"] == dict.fromkeys(broken, "RuntimeError: no graph")
    record = Performer(setting(smaller={"training": {"rounds": 3, "steps": 1, "make": make}}))(
        Job("training", "step", 1)
    )
    assert record["status"] == ("error" if broken else "ok")


@pytest.mark.parametrize(
    ("lines", "tool", "status", "why"),
    [
        ("echo $OUT > $OUT/file; cat $OUT/file", "", "ok", "exit code 0"),
        ("echo first\n$PYTHON -c 'import sys; sys.exit(3)'\necho never", "", "error", "exit code 3: .*first"),
        ("no-such-tool", "no-such-tool", "absent", "not found"),
        ("echo Device not supported; false", "bash", "absent", "does not work here: .*Device not supported"),
        ("echo ERROR SUMMARY: 1; false", "bash", "error", "SUMMARY: 1"),
    ],
)
def test_scripts_end_at_the_first_line_that_fails_and_a_tool_that_cannot_work_has_not_failed(lines, tool, status, why):
    record = commands.run(commands.Script("a script", 1, lines, tool))
    assert record["status"] == status
    assert re.search(why, record["why"])
    assert "never\n" not in record["why"]


def test_the_surrogate_is_held_against_the_loop_and_the_quickest_other_and_a_missing_one_is_not_beaten(tmp_path):
    plan = next(plan for plan in PLANS if plan.spec.operator == "surrogate" and plan.spec.B == 128)  # 20 times, 2 times
    faster = compared(plan.spec, loop=25.0, padded=4.0, padded_compiled=3.0)

    def verdicts(*records):
        return [(each["measured"], each["reached"]) for each in judge(reported(tmp_path, *records), [plan])[:2]]

    own = timed(plan.spec, 1e-4)
    assert verdicts(own, *faster) == [(25.0, True), (3.0, True)]
    assert verdicts(own, *faster[:2]) == [(25.0, True), (4.0, None)]
    assert verdicts(own, *compared(plan.spec, loop=19.0, padded=1.9)) == [(19.0, False), (1.9, False)]
    assert verdicts(own | {"status": "wrong"}, *faster) == verdicts(own) == [(None, None), (None, None)]


def test_variances_are_held_against_the_copy_rate_and_surrogates_against_a_training_step(tmp_path):
    plan = next(plan for plan in PLANS if plan.spec.operator == "class_variance" and plan.judged)
    moved = CASES["class_variance"].cost(plan.spec, "backward").bytes
    rates = {"kind": "rates", "name": "rates", "rates": GB}
    added = {"slots": {"median": 0.02}, "slots captured": {"median": 0.009}, "attention": {"median": 0.06}}
    step = {"kind": "training", "name": "step", "step_seconds": {}, "added": added}
    forward, backward, *steps = judge(reported(tmp_path, rates, timed(plan.spec, moved / 4e12 / 0.82), step), [plan])
    assert (backward["measured"], backward["reached"], forward["reached"]) == (pytest.approx(0.82), True, False)
    assert [(each["measured"], each["reached"]) for each in steps] == [(0.009, True), (0.06, False)]
    assert [each["reached"] for each in judge(reported(tmp_path), [plan])] == [None] * 4


def test_predictions_are_the_largest_of_three_roofs_and_launches():
    spec, rates = replace(TINY, B=4096, T=64), {"copy": 1e12, "fp32": 1e12, "gap": 1e-6, "latency": 1e-9}
    cost, trips = (ask(spec, "forward") for ask in (CASES[spec.operator].cost, CASES[spec.operator].trips))
    for slow, seconds in (({}, cost.bytes / 1e12), ({"fp32": 1.0}, cost.operations), ({"latency": 1.0}, trips)):
        predicted = model.predict(spec, "forward", 3, rates | slow)["microseconds"]
        assert predicted == pytest.approx(3 + 1e6 * seconds, abs=0.1)


def test_the_committed_predictions_are_those_of_the_model_for_all_that_is_timed():
    rows = {(row["case"], row["direction"]): row for row in model.read()}
    assert len(rows) == 3 * len(PLANS)
    for plan in PLANS:
        for direction in DIRECTIONS:
            row = rows[plan.spec.name, direction]
            assert row | {"why": ""} == model.predict(plan.spec, direction, row["launches"])


@pytest.mark.parametrize("spec", [p.spec for p in PLANS if p.spec.B == 128], ids=lambda spec: spec.name)
def test_committed_launches_are_those_of_the_kernels_as_they_are(spec):
    rows = {row["direction"]: row["launches"] for row in model.read() if row["case"] == spec.name}
    assert rows == model.launches_of(spec)


def test_a_prediction_that_is_off_by_more_than_half_owes_a_reason(tmp_path):
    spec = next(plan.spec for plan in PLANS)
    rows = [row for row in model.read() if row["case"] == spec.name]
    for ratio, why in ((1.4, ""), (1.6, "REASON?"), (0.6, "REASON?")):
        records = [timed(spec, 1e-6 * ratio * rows[0]["microseconds"])]
        first, *_ = model.measured(rows, records)
        assert (first["ratio"], first["why"]) == (pytest.approx(ratio), why)
    assert model.measured([rows[0] | {"why": "known"}], records)[0]["why"] == "known"
    assert model.measured(rows, [])[0]["ratio"] is None


def test_a_report_is_on_disk_after_every_record_and_keeps_what_is_not_measured_again(tmp_path):
    report = reported(tmp_path, timed(TINY, 1.0), {"kind": "check", "name": "a", "status": "wrong", "why": "2 times"})
    assert [each["name"] for each in json.loads(report.path.read_text())["records"]] == [TINY.name, "a"]
    again = reported(tmp_path, timed(TINY, 2.0), keep=True)
    assert [each["both"]["device"]["median"] for each in again.of("time")] == [2.0]
    assert again.failures() == ["check a: wrong: 2 times"]
    assert reported(tmp_path).data["records"] == []


def test_the_text_has_all_that_was_found_and_ends_with_what_failed(tmp_path):
    records = [timed(TINY, 1e-5), *compared(TINY, loop=3.0), {"kind": "rates", "name": "rates", "rates": GB}]
    records += [{**timed(TINY, 1e-5), "kind": "sweep", "name": "width: x"}, {"kind": "command", "name": "cem.train"}]
    kernels = [{"kernel": "some_kernel", "count": 2.0, "microseconds": 3.0}]
    records.append({"kind": "profile", "name": "p", "launches": 2.0, "microseconds": 3.0, "kernels": kernels})
    records.append({"kind": "training", "name": "step", "step_seconds": {"none": {"median": 5e-3}}, "added": {}})
    records.append({"kind": "compare", "name": "x", "variant": "flex", "status": "error", "why": "no answer"})
    report = reported(tmp_path, *records)
    report.set(targets=judge(report, [Plan(CENTROID, judged=True)]), left_out={"2": ["time y"]})
    lines = text(report, ["PREDICTED"])
    parts = ("Some GPU", "10.0", "1000e", "3.00 / 3.00", "cem.train", "some_kernel", "5.000 ms", "time y", "PREDICTED")
    assert [part for part in (*parts, "not measured ") if part not in lines] == []
    assert lines.endswith("1 failed:\ncompare x flex: error: no answer")


def test_what_is_missing_is_named_with_the_way_to_bring_it(tmp_path, monkeypatch, capsys):
    wanted = '["torch>=2", "no-such-package>=0.9", "numpy>=99"]'
    project = f"[project]\ndependencies = {wanted}\n[project.optional-dependencies]\ntest = []"
    (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.setattr(environment, "PROJECT", tmp_path / "pyproject.toml")
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "no-such-package>=0.9 numpy>=99" in said
    assert "benchmarks.gpu.pack FOLDER --wheels no-such-package numpy" in said
    monkeypatch.undo()
    assert environment.missing() == []


def test_without_a_device_or_a_case_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert command.main(["--only", "no such case"]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said
    assert "nothing has 'no such case' in its name" in said


def test_a_pack_is_the_last_commit_and_runs_where_only_python_is(tmp_path, monkeypatch, capsys):
    checkout, folder, tools = (tmp_path / name for name in ("checkout", "checkout/.gpu", "tools"))
    (checkout / "benchmarks").mkdir(parents=True)
    tools.mkdir()
    (checkout / "benchmarks/file.py").write_text("committed")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(pack, "ROOT", checkout)
    (checkout / "benchmarks/file.py").write_text("changed")
    for _ in range(2):  # an earlier pack is replaced
        pack.main([str(folder)])
        assert (folder / "project/benchmarks/file.py").read_text() == "committed"
    assert "what is not committed is not packed" in capsys.readouterr().err
    assert "gpu" not in subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    (tools / "python3").write_text('#!/bin/sh\necho "$PWD $PYTHONPATH $@"; echo progress >&2; exit 1\n')
    (tools / "python3").chmod(0o755)
    path = {"PATH": f"{tools}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", str(folder / "run.sh"), "--phase", "1"], env=path, capture_output=True, text=True)
    project = folder / "project"
    assert done.stdout == f"{project} {project} -m benchmarks.gpu --out {tmp_path}/out/gpu.json --phase 1\n"
    assert ((tmp_path / "out/gpu.txt").read_text(), done.returncode) == (done.stdout, 1)
    with pytest.raises(SystemExit, match="neither empty nor an earlier pack"):
        pack.main([str(checkout / "benchmarks")])
    monkeypatch.setattr(pack, "MOST_BYTES", 10)
    with pytest.raises(SystemExit, match="MiB"):
        pack.main([str(folder)])


@pytest.mark.slow
def test_a_whole_run_leaves_every_figure_and_a_phase_can_be_repeated(tmp_path, monkeypatch, capsys):
    """In processes, with interpreted kernels, competitors that compile, and a clock that shows that every step runs."""
    out = tmp_path / "new" / "gpu.json"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert command.main(["--out", str(out), "--budget", "900"], setting()) == 0, capsys.readouterr()
    data = json.loads(out.read_text())
    assert data["left_out"] == {phase: [] for phase in "123"}
    found = {(each["kind"], each["name"], each["variant"]): each["status"] for each in data["records"]}
    wanted = [job for phase in jobs.phases(setting()).values() for job in phase]
    assert set(found) == {(job.kind, job.name, job.variant) for job in wanted}
    assert {name for name, status in found.items() if status != "ok"} == {("command", "a tool", "")}
    assert "nothing failed" in capsys.readouterr().out
    assert command.main(["--out", str(out), "--phase", "2", "--only", CENTROID.name], setting()) == 0
    assert len(json.loads(out.read_text())["records"]) == len(wanted)
