"""``python -m benchmarks.studies``: rank correlations of committed tables, and the data set of 100 classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import studies
from cem.comparison.correlation import spearman
from cem.data.files import read_folder

RESULTS = Path(studies.__file__).parent / "results"


def test_the_committed_correlations_are_what_the_committed_tables_say(capsys):
    tables = [str(RESULTS / f"{name}.csv") for name in ("remedies", "fidelity")]
    studies.main(["correlations", *tables, "--against", "class_entropy"])
    committed = (RESULTS / "fidelity-correlations.csv").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == [line for line in committed if not line.startswith("#")]


def test_seeds_of_a_setting_that_say_the_same_make_no_interval_narrower():
    rng = np.random.default_rng(2)
    y = rng.normal(size=9)
    x, other = y + rng.normal(size=9), rng.normal(size=9)
    thrice = [np.repeat(each, 3) for each in (x, other, y)]
    once, drawn = studies.resamples(range(9)), studies.resamples(np.repeat(range(9), 3).tolist())
    assert spearman(thrice[0], thrice[2], drawn=drawn) == pytest.approx(spearman(x, y, drawn=once))
    assert studies.difference(*thrice, drawn) == pytest.approx(studies.difference(x, other, y, once))
    assert studies.difference(x, other, y, once)[0] == pytest.approx(spearman(x, y)[0] - spearman(other, y)[0])
    assert sum(map(len, studies.resamples(["a", "a", "a", "b", "c", "c", "d"]))) == 10_000


def test_every_garment_is_used_once_and_the_class_names_both_in_order():
    labels = torch.arange(41) % 10
    images = torch.arange(41, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 4).clone()
    images[..., 1::2] += 2  # columns are averaged two by two
    pairs, classes = studies.make_pairs(images, labels)
    assert (pairs.shape, pairs.dtype) == ((20, 1, 2, 4), torch.uint8)
    left, right = (pairs[..., at] - 1 for at in (0, 3))
    assert len({*left.flatten().tolist(), *right.flatten().tolist()}) == 40
    assert torch.equal(10 * (left[:, 0, 0] % 10) + right[:, 0, 0] % 10, classes)


def test_pairs_that_are_written_are_read_again(tmp_path):
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 6, 6)
    pairs, labels = studies.make_pairs(images, torch.arange(40) % 2)
    for part in ("train", "test"):
        studies.write_pairs(pairs, labels, tmp_path / part)
    read, found = read_folder(tmp_path, 6).train
    order = torch.argsort(labels, stable=True)
    assert torch.equal(read, pairs[order].expand(-1, 3, -1, -1))
    assert len(found) == 20
