"""What a user sees of a command besides its results: progress on a terminal, and letters that any stream can take."""

import io
import re
import sys

import pytest
import torch

from cem import compare, progress
from cem.command import run_command
from cem.data import synthetic
from cem.report.tsne import draw_tsne


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_sees_what_remains_and_a_clock_but_no_bar_of_a_short_pass(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "DELAY", 600)
    with progress.busy("thinking"), progress.bar(4, "training") as bar:
        assert list(progress.over("ab", "validation")) == ["a", "b"]
        bar.update(1)
        bar.refresh()
    seen = sys.stderr.getvalue()
    assert "thinking 00:00" in seen
    assert "training  25%|" in seen
    assert " left" in seen
    assert "validation" not in seen
    monkeypatch.setattr(progress, "DELAY", 0)
    assert list(progress.over("ab", "validation")) == ["a", "b"]
    assert "validation   0%|" in sys.stderr.getvalue()


def test_no_bar_is_drawn_where_output_is_no_terminal(trained):
    assert "epoch 2/2" in trained.err
    assert "\r" not in trained.err
    assert "%|" not in trained.err


def test_map_of_features_shows_its_progress_and_prints_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    draw_tsne(torch.randn(8, 3), torch.arange(8) % 2, ["a", "b"], tmp_path / "tsne.png")
    assert re.search(
        r"t-SNE +[1-9]\d*%\|", sys.stderr.getvalue()
    )  # how far, when it is drawn for the last time, is chance
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (89, "89 s"), (130, "2 min"), (9000, "2.5 h")])
def test_forecast_is_no_more_exact_than_it_can_be(seconds, text):
    assert progress.about(seconds) == text


def test_comparison_says_what_it_does_and_what_comes_next(run, tmp_path, monkeypatch):
    monkeypatch.setattr("cem.comparison.runner.run_comparison", lambda *_: None)
    said = run(compare, ["--quick"], tmp_path)
    assert said.err.startswith("none, mixture, slots on digits: resnet20, 20 epochs, 2 seeds; attackers who have ")
    assert "; every run is trained, then attacked with decoder, white-box\n" in said.err
    assert said.out.splitlines()[-1] == f"next     python -m webbrowser {(tmp_path / 'report.html').as_uri()}"


def test_images_for_tests_say_how_to_train_on_them(tmp_path, capsys):
    out = str(tmp_path / "a")
    assert synthetic.main([out, "--num-classes=2", "--train-per-class=1", "--test-per-class=1"]) == 0
    assert len(list(tmp_path.glob("a/*/class*/*.png"))) == 4
    assert capsys.readouterr().out.endswith(f"python -m cem.train --data folder --data-root {out}\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "σ ≤ ½ – é λ·x ☃"),
        ("ascii", "sigma <= 1?2 - e? lambda*x ?"),
        ("cp1252", "sigma <= ½ – é lambda·x ?"),
        ("cp932", "σ <= 1?2 - e? λ*x ?"),
    ],
)
def test_what_a_stream_cannot_encode_is_spelled_out(name, encoding, text, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, name, stream)
    assert run_command(lambda: print("σ ≤ ½ – é λ·x ☃", file=stream) or 0) == 0
    assert stream.buffer.getvalue().decode(encoding).strip() == text
