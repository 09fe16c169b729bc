"""What README, docs and examples show must run, and what they name must exist."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import cem
from cem.attacks.config import AttackConfig
from cem.compare import parse
from cem.comparison.grid import GridOptions
from cem.training import TrainConfig

ROOT = Path(__file__).parent.parent
README, DOCS, SCRIPT = ROOT / "README.md", ROOT / "docs", ROOT / "examples" / "run_exp.sh"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMED_BLOCK = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
needs_a_shell = pytest.mark.skipif(sys.platform == "win32", reason="a shell script")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(page: Path, module: str = r"[\w.]+") -> list[list[str]]:
    """What a page's shell lines hand to ``python -m MODULE``: the module, then its arguments."""
    lines = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line)]
    words = [shlex.split(part, comments=True) for part in parts if re.search(rf"python3? -m {module}\b", part)]
    return [line[line.index("-m") + 1 :] for line in words if "-m" in line]


def tables(page: Path, head: str) -> Iterator[list[str]]:
    """The rows of a page's tables whose first column is called ``head``, without back quotes."""
    text = page.read_text(encoding="utf-8")
    for table in re.findall(rf"^\| `?{head}`? \|.*\n\|[-:| ]+\n((?:\|.*\n?)+)", text, re.MULTILINE):
        yield from ([cell.strip(" `") for cell in row.strip("|").split("|")] for row in table.splitlines())


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, from which files of a page can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for family in (cem.SURROGATES, cem.DEFENSES):  # what a page registers is forgotten with it
        monkeypatch.setattr(family, "_members", dict(family._members))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write_named(page: Path, folder: Path) -> None:
    """Write the blocks that begin with the name of a file into that file."""
    for text in blocks(page, "python", "yaml"):
        if named := NAMED_BLOCK.match(text):
            (folder / named[1]).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def names(pages: list[Path]) -> list[str]:
    """What to call the tests of these pages."""
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
TRAINS_AND_ATTACKS = [DOCS / "attacking.md"]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in TRAINS_AND_ATTACKS)) for page in WITH_PYTHON],
    ids=names(WITH_PYTHON),
)
def test_python_of_a_page_runs(page: Path, beside: Path) -> None:
    write_named(page, beside)
    namespace: dict[str, object] = {"__name__": page.stem}
    for text in blocks(page, "python"):
        if named := NAMED_BLOCK.match(text):
            namespace |= vars(importlib.import_module(Path(named[1]).stem))
        else:
            exec(compile(text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=names(WITH_COMMANDS))
def test_shell_lines_are_understood_by_the_commands_that_they_call(page: Path, beside: Path) -> None:
    write_named(page, beside)
    (beside / "runs" / "first").mkdir(parents=True)
    TrainConfig(train_size=700).to_yaml(beside / "runs" / "first" / "config.yaml")
    for module, *arguments in commands(page):
        assert find_spec(module), f"there is no module {module}"
        if module in ("cem.train", "cem.attack", "cem.compare") and "--help" not in arguments:
            options = importlib.import_module(module).parse(arguments)[module == "cem.attack"]
            options.checked()


@pytest.mark.slow
def test_the_three_commands_of_the_readme_work_one_after_the_other(tmp_path: Path) -> None:
    wanted = {"cem.train", "cem.attack", "cem.compare"}
    (block,) = (text for text in blocks(README, "bash") if all(module in text for module in wanted))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = [line for line in block.splitlines() if "python -m cem." in line]
    assert len(lines) >= 3
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the docs extra")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asks = re.compile(r"""<(script|img|iframe|link)\b[^>]*(src|href)=["']?(https?:)?//|url\(["']?https?:|@import""")
    for file in (tmp_path / "site").rglob("*"):
        if file.suffix in (".html", ".css"):
            assert not (found := asks.search(file.read_text(encoding="utf-8"))), f"{file.name}: {found[0]}"


@pytest.mark.parametrize(
    ("page", "kind"),
    [("README.md", TrainConfig), ("docs/training.md", TrainConfig), ("docs/attacking.md", AttackConfig),
     ("docs/comparing.md", GridOptions)],
)  # fmt: skip
def test_options_in_tables_have_the_defaults_that_stand_there(page: str, kind: type) -> None:
    rows = list(tables(ROOT / page, "option"))
    assert rows
    for flag, default, *_ in rows:
        value = getattr(kind(), flag.removeprefix("--").replace("-", "_"))
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert (f"{value:g}" if isinstance(value, float) else str(value)) == default, flag


@pytest.mark.parametrize("page", ["README.md", "docs/surrogates.md"])
def test_methods_in_tables_are_those_that_exist_with_the_weights_that_they_have(page: str) -> None:
    rows = {row[0]: " ".join(row[1:]) for row in tables(ROOT / page, "--surrogate")}
    assert rows.keys() == set(cem.SURROGATES)
    for name in rows.keys() - {"none"}:
        member = cem.SURROGATES[name]
        assert member.__name__ in rows[name]
        assert f"{member.Options.weight:g}, {member.schedule}" in rows[name]


def test_defenses_in_tables_are_those_that_exist() -> None:
    assert {name for name, *_ in tables(DOCS / "training.md", "--defenses") if ":" not in name} == set(cem.DEFENSES)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_pictures_and_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def arguments(tmp_path: Path, *options: str) -> list[str]:
    """What ``examples/run_exp.sh`` hands to ``python -m cem.compare``."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    line = ["bash", str(SCRIPT), *options]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    module, *rest = done.stdout.splitlines()[1:]
    assert module == "cem.compare"
    return rest


@needs_a_shell
def test_the_originals_experiments_are_all_asked_for(tmp_path: Path) -> None:
    comparison = parse(arguments(tmp_path, "--data-root", "somewhere"))[0].checked()
    # Seeds, noises; none, the paper's mixture and the original attention at two λ, and what is recommended.
    assert len(comparison.grid.runs()) == 3 * 5 * (1 + 2 + 2 + 1)
    configs = [comparison.train_config(run) for run in comparison.grid.runs()]
    weights = Counter((config.surrogate, config.lambd) for config in configs)
    of_two = {(name, lambd): 15 for name in ("mixture", "attention") for lambd in (8.0, 16.0)}
    assert weights == {("none", 0.0): 15, **of_two, ("slots", 0.5): 15}
    thresholds = {config.options_of(config.surrogate).var_threshold for config in configs if config.lambd >= 8}
    assert thresholds == {0.125}
    originals = [config for config in configs if config.surrogate == "attention"]
    assert {config.options_of("attention").reduction for config in originals} == {"none"}
    assert {config.resolved().lambd_schedule for config in originals} == {"rising"}
    assert (comparison.train.data, comparison.train.epochs, comparison.train.arch) == ("cifar10", 240, "vgg11_bn_sgm")
    assert comparison.train.data_root == Path("somewhere")


@needs_a_shell
def test_options_on_the_line_override_the_scripts(tmp_path: Path) -> None:
    line = arguments(tmp_path, "--surrogates", "none", "centroid", "--variants", "--epochs", "2", "--lambds", "1")
    comparison = parse(line)[0].checked()
    assert comparison.train.epochs == 2
    assert {(run.setting.method, run.setting.lambd) for run in comparison.grid.runs()} == {("none", 0), ("centroid", 1)}


@needs_a_shell
def test_short_mode_is_the_quick_comparison(tmp_path: Path) -> None:
    comparison = parse(arguments(tmp_path, "--short", "--seeds", "7"))[0].checked()
    assert comparison.grid.surrogates == ("none", "mixture", "attention", "slots")
    assert (comparison.train.data, comparison.grid.seeds, comparison.out) == ("digits", (7,), Path("runs/exp-short"))
