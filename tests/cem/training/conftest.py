"""Runs that take a third of a second."""

import pytest
from small_runs import small, tiny

from cem.models import split
from cem.training import trainer as trainer_module


@pytest.fixture(autouse=True, scope="session")
def _tiny_network():
    """Let runs choose the network of these tests by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(split._BUILDERS, "tiny", tiny)
        patch.setattr(split, "ARCHITECTURES", (*split.ARCHITECTURES, "tiny"))
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures have tests of their own, and t-SNE takes longer than training here."""
    monkeypatch.setattr(trainer_module, "draw_tsne", lambda *_, **__: None)
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_, **__: None)


@pytest.fixture
def make(tmp_path):
    """Options of a small run in the directory of that name."""

    def make(name="run", **options):
        return small(tmp_path / name, **options)

    return make
