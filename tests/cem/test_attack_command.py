"""``python -m cem.attack``: options in, exit code, table and directory out."""

import json
import re
from pathlib import Path

import pytest

from cem import attack as command

FAST = ["--attacks", "decoder", "--decoder.networks=deconvC4", "--decoder.cycle-epochs=1", "--decoder.max-cycles=1"]
FAST += ["--aux-size=64", "--score-size=20"]


@pytest.fixture(scope="module")
def attacked(trained, run, tmp_path_factory):
    return run(command, [str(trained.path), *FAST, "--device=cpu"], tmp_path_factory.mktemp("command") / "attack")


def test_attack_says_what_it_does_what_was_found_and_what_comes_next(trained, attacked):
    result = json.loads((attacked.path / "attack.json").read_text())
    said = f"attack on {trained.path}: decoder; knowledge auxiliary: 64 images to learn from, "
    assert attacked.err.startswith(said)
    assert "scored on 20 unseen images and 5 that it was trained on; queries an image: 1; cpu\n" in attacked.err
    assert re.search(r"takes about .+, less where attacks end early\n", attacked.err)
    assert attacked.err.count("\n") <= 12
    worst = result["worst"]["mse"]
    assert worst["attack"] == "decoder"
    lines = {line[:23].strip(): line.split() for line in attacked.out.splitlines()}
    assert f"{worst['value']:.5f}" in lines["worst"]
    for name, control in result["controls"].items():
        line = lines[f"guess: {name.replace('_', ' ')}"]
        assert {f"{control[part]['mse']:.5f}" for part in ("metrics", "train_target")} < {*line}
    assert f"\nresults   {attacked.path}: attack.json" in attacked.out
    assert attacked.out.splitlines()[-1].startswith("next      python -m cem.compare --quick ")
    assert result["attacks"]["decoder"]["converged"] is False
    assert "not converged: --decoder.max-cycles 2 would give it another one" in attacked.out


def test_the_same_command_again_changes_nothing(trained, attacked, run):
    before = {path: path.stat().st_mtime_ns for path in attacked.path.iterdir()}
    (attacked.path / ".lock").touch()  # as whoever is killed after the last file leaves it
    again = run(command, [str(trained.path), *FAST], attacked.path)
    assert again.out == f"The attack in {attacked.path} was finished already; nothing was changed.\n{attacked.out}"
    assert {path: path.stat().st_mtime_ns for path in attacked.path.iterdir()} == before


def test_options_of_another_attack_can_be_taken_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("attacks: [decoder]\nqueries: 3\ndecoder: {networks: ['deconvC8:l1'], lr: 0.1}\n")
    run, config, out = command.parse(["RUN", "--config", str(path), "--queries", "2", "--decoder.lr", "0.2"])
    own = config.options_of("decoder")
    assert (run, own.networks, own.lr, config.queries, out) == (Path("RUN"), ("deconvC8:l1",), 0.2, 2, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("RUN --decoder.networks resnet", "networks are named like preactN8C64"),
        ("RUN --attacks decoder --oracle.depth 3", "there is no option --oracle.depth"),
        ("RUN --aux-size 1000000", "--aux-size must be in 1.."),
        ("RUN --score-size 0", "--score-size must be at least 1, got 0"),
        ("RUN --knowledge training auxiliary", "--out is for one attack"),
        ("RUN --control nowhere", "--control nowhere has no finished attack"),
        ("nowhere", "nowhere holds no finished run"),
        ("", "which run? python -m cem.attack RUN [options]; RUN comes first"),
    ],
)
def test_bad_options_end_with_2_and_one_line(trained, run, tmp_path, line, message):
    said = run(command, line.replace("RUN", str(trained.path)).split(), tmp_path / "attack")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert message in said.err
    assert not said.path.exists()
