"""What the examples ask for must exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cem.compare import parse

SCRIPT = Path(__file__).parent.parent / "examples" / "run_exp.sh"


def arguments(tmp_path: Path, *options: str) -> list[str]:
    """What the script hands to ``python -m cem.compare``."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), *options],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    module, *rest = done.stdout.splitlines()[1:]
    assert module == "cem.compare"
    return rest


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_originals_experiments_are_all_asked_for(tmp_path: Path) -> None:
    comparison, _ = parse(arguments(tmp_path, "--data-root", "somewhere"))
    comparison.validate()
    # Seeds, noises; none, mixture and original attention at two λ, and what is recommended.
    assert len(comparison.grid.runs()) == 3 * 5 * (1 + 2 + 2 + 1)
    originals = [run for run in comparison.grid.runs() if run.setting.surrogate == "original"]
    assert {comparison.train_config(run).measure for run in originals} == {"enhanced"}
    thresholds = {comparison.train_config(run).var_threshold for run in comparison.grid.runs()}
    assert thresholds == {0.125}
    assert (comparison.train.data, comparison.train.epochs, comparison.train.arch) == ("cifar10", 240, "vgg11_bn_sgm")
    assert comparison.train.data_root == Path("somewhere")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_short_mode_is_the_quick_comparison(tmp_path: Path) -> None:
    comparison, _ = parse(arguments(tmp_path, "--short", "--seeds", "7"))
    comparison.validate()
    assert comparison.grid.surrogates == ("none", "gmm", "seed", "attention")
    assert (comparison.train.data, comparison.grid.seeds, comparison.out) == ("digits", (7,), Path("runs/exp-short"))
