"""What the README shows must run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python_example_runs_and_trains_the_encoder():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert float(names["rob_loss"].detach()) > 0
    assert float(names["encoder"].weight.grad.abs().sum()) > 0


def test_every_option_in_the_table_exists_with_the_default_it_says():
    from cem.train import CommandLine

    rows = re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]*)`? \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    options = CommandLine()
    for name, default in rows:
        value = getattr(options, name.replace("-", "_"))
        if name not in ("data-root", "centralized", "amp"):  # described in words
            assert f"{value:g}" == default if isinstance(value, float) else str(value) == default, name


@pytest.mark.parametrize("picture", re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8")))
def test_pictures_exist(picture):
    assert (README.parent / picture).is_file()
