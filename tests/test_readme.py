"""What the README shows must run."""

import re
from pathlib import Path

import pytest

import cem

README = Path(__file__).parent.parent / "README.md"


def test_python_example_runs_and_trains_the_encoder():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert float(names["rob_loss"].detach()) > 0
    assert float(names["encoder"].weight.grad.abs().sum()) > 0


def test_every_option_in_the_table_exists_with_the_default_it_says():
    from cem.training import TrainConfig

    rows = re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]*)`? \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [row for row in rows if row[0] != "surrogate" or row[1] != "class"]
    assert len(rows) >= 8
    for name, default in rows:
        value = getattr(TrainConfig(), name.replace("-", "_"))
        assert f"{value:g}" == default if isinstance(value, float) else str(value) == default, name


def test_methods_are_those_that_exist_with_the_weights_that_they_have():
    lines = README.read_text(encoding="utf-8").partition("| `--surrogate` |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert {row[0] for row in rows} == set(cem.SURROGATES)
    for name, kind, _, weight in rows:
        member = cem.SURROGATES[name]
        if kind:
            assert (member.__name__, f"{member.Options.weight:g}, {member.schedule}") == (kind, weight)


@pytest.mark.parametrize("picture", re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8")))
def test_pictures_exist(picture):
    assert (README.parent / picture).is_file()
