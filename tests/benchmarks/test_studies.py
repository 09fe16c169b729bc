"""``python -m benchmarks.studies``: rank correlations of committed tables, and the data set of 100 classes."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import studies
from cem.comparison.correlation import spearman
from cem.data.folder import read_folder

RESULTS = Path(studies.__file__).parent / "results"
ALL = studies.RESAMPLES


@pytest.mark.parametrize("drawn", [10, pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_committed_correlations_are_what_the_committed_tables_say(drawn, monkeypatch, capsys):
    monkeypatch.setattr(studies, "RESAMPLES", drawn)
    tables = [str(RESULTS / f"{name}.csv") for name in ("remedies", "fidelity")]
    studies.main(["correlations", *tables, "--against", "class_entropy"])
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    with open(RESULTS / "fidelity-correlations.csv", newline="") as file:
        committed = list(csv.DictReader(line for line in file if not line.startswith("#")))
    exact = committed[0] if drawn == ALL else ("value", "runs", "rho", "class_entropy_minus_this")
    assert [{k: line[k] for k in exact} for line in printed] == [{k: line[k] for k in exact} for line in committed]


def test_seeds_of_a_setting_that_say_the_same_make_no_interval_narrower():
    rng = np.random.default_rng(2)
    y = rng.normal(size=9)
    x, other = y + rng.normal(size=9), rng.normal(size=9)
    thrice = [np.repeat(each, 3) for each in (x, other, y)]
    once, drawn = studies.resamples(range(9)), studies.resamples(np.repeat(range(9), 3).tolist())
    assert spearman(thrice[0], thrice[2], drawn=drawn) == pytest.approx(spearman(x, y, drawn=once))
    assert studies.difference(*thrice, drawn) == pytest.approx(studies.difference(x, other, y, once))
    assert studies.difference(x, other, y, once)[0] == pytest.approx(spearman(x, y)[0] - spearman(other, y)[0])


def test_every_garment_is_used_once_and_the_class_names_both_in_order(tmp_path):
    labels = torch.arange(41) % 10
    images = torch.arange(41, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).clone()
    images[..., 1::2] += 2  # columns are averaged two by two
    for part in ("train", "test"):
        studies.write_pairs(*studies.make_pairs(images, labels), tmp_path / part)
    files = read_folder(tmp_path, 4)
    pairs, classes = files.train
    left, right = (pairs[:, 0, 0, at].long() - 1 for at in (0, 3))
    assert pairs.shape == (20, 3, 4, 4)
    assert len({*left.tolist(), *right.tolist()}) == 40
    named = [f"{one % 10}-{other % 10}" for one, other in zip(left.tolist(), right.tolist(), strict=True)]
    assert [files.class_names[each] for each in classes] == named
