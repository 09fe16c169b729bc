"""What the examples ask for must exist."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
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
    comparison = comparison.checked()
    # Seeds, noises; none, the paper's mixture and the original attention at two λ, and what is recommended.
    assert len(comparison.grid.runs()) == 3 * 5 * (1 + 2 + 2 + 1)
    configs = [comparison.train_config(run) for run in comparison.grid.runs()]
    weights = Counter((config.surrogate, config.lambd) for config in configs)
    of_two = {(name, lambd): 15 for name in ("mixture", "attention") for lambd in (8.0, 16.0)}
    assert weights == {("none", 0.0): 15, **of_two, ("centroid", 0.5): 15}
    thresholds = {config.options_of(config.surrogate).var_threshold for config in configs if config.lambd >= 8}
    assert thresholds == {0.125}
    originals = [config.options_of("attention") for config in configs if config.surrogate == "attention"]
    assert {options.reduction for options in originals} == {"none"}
    assert (comparison.train.data, comparison.train.epochs, comparison.train.arch) == ("cifar10", 240, "vgg11_bn_sgm")
    assert comparison.train.data_root == Path("somewhere")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_options_on_the_line_override_the_scripts(tmp_path: Path) -> None:
    comparison, _ = parse(arguments(tmp_path, "--surrogates", "none", "centroid", "--epochs", "2", "--lambds", "1"))
    comparison = comparison.checked()
    assert comparison.train.epochs == 2
    assert {(run.setting.method, run.setting.lambd) for run in comparison.grid.runs()} == {("none", 0), ("centroid", 1)}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_short_mode_is_the_quick_comparison(tmp_path: Path) -> None:
    comparison, _ = parse(arguments(tmp_path, "--short", "--seeds", "7"))
    comparison = comparison.checked()
    assert comparison.grid.surrogates == ("none", "mixture", "attention", "centroid")
    assert (comparison.train.data, comparison.grid.seeds, comparison.out) == ("digits", (7,), Path("runs/exp-short"))
