"""Pictures: drawn, complete, and readable back."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from cem.report.attack_curves import draw_attack_curves
from cem.report.curves import draw_curves
from cem.report.frontier import Priced, draw_frontier
from cem.report.reconstructions import draw_reconstructions
from cem.report.tradeoff import ROOM, Point, draw_tradeoff
from cem.report.tsne import draw_tsne

IMAGES = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
NAMES = [str(digit) for digit in range(10)]


@pytest.fixture
def path(tmp_path):
    """Of a picture, which must not be blank in the end, where there is one."""
    path = tmp_path / "picture.png"
    yield path
    if path.exists():
        assert imread(path).std() > 0.01, "the picture is blank"


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, and saving still works."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda fig, *args, **options: (saved.append(fig), save(fig, *args, **options))
    )
    return saved


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# Training.


def history(epochs, rob_loss=1.0):
    same = {"intra_mse": 0.1, "train_accuracy": 0.9, "val_accuracy": 0.8, "seconds": 1.0, "surrogate_seconds": 0.5}
    falling = {"lr": 0.05, "train_loss": 2.0, "cross_entropy": 1.0, "rob_loss": rob_loss}
    return [
        {"epoch": epoch, "lambda_eff": 0.3 * epoch, **{name: value / epoch for name, value in falling.items()}, **same}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [1, 60])
def test_curves_show_the_terms_and_mark_the_best_epoch(path, figures, epochs):
    draw_curves(history(epochs), path, best_epoch=1)
    loss, accuracy, *_ = figures[0].axes
    assert legend(loss)[:2] == ["cross-entropy", "sum"]
    assert legend(loss)[3:] == ["penalty", "best epoch (1)"]
    assert legend(accuracy) == ["training", "validation", "best epoch (1)"]
    weighted = loss.lines[2].get_ydata()
    assert weighted == pytest.approx([0.3] * epochs)


def test_curves_without_a_penalty_show_the_cross_entropy_alone(path, figures):
    draw_curves(history(5, rob_loss=0.0), path)
    assert legend(figures[0].axes[0]) == ["cross-entropy"]


@pytest.mark.parametrize(
    ("samples", "shape", "classes"), [(3, (2,), 10), (40, (8, 2, 2), 10), (12, (1,), 10), (50, (4,), 100)]
)
def test_map_has_a_point_a_sample_and_a_legend_where_it_can_hold_the_classes(path, figures, samples, shape, classes):
    torch.manual_seed(0)
    labels = torch.arange(samples) % classes
    draw_tsne(torch.randn(samples, *shape), labels, [str(name) for name in range(classes)], path)
    axes = figures[0].axes[0]
    assert sum(len(points.get_offsets()) for points in axes.collections) == samples
    assert (legend(axes) if axes.get_legend() else []) == ([] if classes > 20 else NAMES[:samples])


def test_map_takes_no_more_than_the_maximum(path, figures, monkeypatch):
    monkeypatch.setattr("cem.report.tsne.MAX_SAMPLES", 5)
    draw_tsne(torch.randn(9, 3), torch.zeros(9).long(), NAMES, path)
    assert [len(points.get_offsets()) for points in figures[0].axes[0].collections] == [5]


# Attacks.


def attacker(name, converged=True):
    return {
        "name": name,
        "curve": [{"epoch": epoch, "val_mse": 0.1 / epoch} for epoch in (1, 2, 3)],
        "best_epoch": 2,
        "converged": converged,
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_has_the_originals_over_a_row_for_every_name(path, figures, channels):
    images = np.random.default_rng(0).integers(0, 256, (4, channels, 8, 8), dtype=np.uint8)
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    rows = {
        "decoder": (images // 2, scores, scores / 10),
        "gan": (images, None, scores),
        "mean": (images, scores * np.nan, None),
    }
    draw_reconstructions(images, rows, path)
    axes = figures[0].axes
    assert len(axes) == 4 * 4
    assert [text.get_text() for text in figures[0].texts] == ["original", *rows]
    assert [each.get_xlabel() for each in axes[4:6]] == ["SSIM 0.10\nMSE 0.0100", "SSIM 0.20\nMSE 0.0200"]
    assert [each.get_xlabel() for each in axes[8:10]] == ["MSE 0.100", "MSE 0.200"]
    assert axes[12].get_xlabel() == ""
    shown = np.asarray(axes[5].images[0].get_array())
    expected = images[1] // 2
    assert np.array_equal(shown, expected[0] if channels == 1 else np.moveaxis(expected, 0, -1))


def test_curves_tell_nine_decoders_apart_and_which_converged_and_show_the_controls(path, figures):
    attackers = [attacker(NAMES[number], converged=number != 1) for number in range(9)]
    draw_attack_curves(attackers, {"mean image": 0.09, "class mean": 0.05}, path)
    (axes,) = figures[0].axes
    assert legend(axes) == ["0", "1 (not converged)", *NAMES[2:9], "mean image", "class mean"]
    lines = axes.lines[: 2 * 9]  # a curve and a dot each
    assert len({(line.get_color(), line.get_linestyle()) for line in lines[::2]}) == 9
    assert [tuple(line.get_xydata()[0]) for line in lines[1::2]] == [(2, 0.05)] * 9
    assert [line.get_markerfacecolor() == "white" for line in lines[1::2]] == [number == 1 for number in range(9)]


def test_curve_of_a_network_that_starts_from_another_begins_at_epoch_0_and_its_end_is_open(figures, path):
    curve = [{"epoch": epoch, "val_mse": 0.1 + epoch} for epoch in range(4)]
    draw_attack_curves([{"name": "fine", "curve": curve, "best_epoch": 2, "converged": None}], {}, path)
    (axes,) = figures[0].axes
    assert legend(axes) == ["fine"]
    assert tuple(axes.lines[1].get_xydata()[0]) == (2, 2.1)


# Comparisons.


def point(method="mixture", lambd=16.0, noise_std=0.1, mse=0.03):
    return Point(method, lambd, noise_std, mse, 0.9)


@pytest.mark.parametrize(
    "points",
    [
        [point(noise_std=noise, lambd=lambd) for noise in (0.1, 0.2) for lambd in (4.0, 16.0)],
        [point(noise_std=0.1 * index) for index in range(1, 10)],
    ],
    ids=["grid", "more noises than markers"],
)
def test_tradeoff_says_what_everything_is_and_its_axes_follow_the_runs(path, figures, points):
    draw_tradeoff(points, {"mean image": 0.09, "class mean": 0.033}, path)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[-2:] == ["mean image: 0.09, beyond", "class mean: 0.033"]
    assert len([label for label in labels if label.startswith("noise")]) == len({each.noise_std for each in points})
    assert {"a run", "mean of a setting", "the same λ, more noise"} <= {*labels}
    assert ("the same noise, larger λ" in labels) == (len({each.lambd for each in points}) > 1)
    (axes,) = figures[0].axes
    assert axes.lines[-1].get_xdata()[0] == 0.033
    errors = [each.mse for each in points]
    assert axes.get_xlim() == pytest.approx((min(errors) / ROOM, max(errors) * ROOM))
    drawn = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert len(drawn) >= 3


def test_tradeoff_has_a_mark_a_run_and_a_hollow_one_at_the_mean_of_a_setting(path, figures):
    draw_tradeoff([point(mse=0.02), point(mse=0.04)], {}, path)
    mean, runs = figures[0].axes[0].collections
    np.testing.assert_allclose(mean.get_offsets(), [[0.03, 90]])
    np.testing.assert_allclose(runs.get_offsets(), [[0.02, 90], [0.04, 90]])


def test_tradeoff_joins_no_settings_of_two_clients_and_names_both(path, figures):
    found = [replace(point(noise_std=noise), client=client) for noise in (0.1, 0.2) for client in ("cut 2", "cut 4")]
    draw_tradeoff(found, {}, path)
    (axes,) = figures[0].axes
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2]
    assert {text.get_text() for text in axes.texts} == {"cut 2", "cut 4"}


@pytest.mark.parametrize(("methods", "numbers"), [(7, set()), (8, set("12345678"))])
def test_tradeoff_numbers_methods_that_colors_cannot_tell_apart(path, figures, methods, numbers):
    draw_tradeoff([replace(point(), method=f"s{index}") for index in range(methods)], {}, path)
    (axes,) = figures[0].axes
    assert {text.get_text().strip() for text in axes.texts} - {""} == numbers
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert ("8 s7 λ 16" in labels) == bool(numbers)


def test_frontier_joins_the_largest_errors_of_what_is_accurate_enough_client_by_client(path, figures):
    found = [("a", 1, 0.02, 0.9), ("a", 1, 0.03, 0.9), ("a", 2, 0.04, 0.9), ("a", 2, 0.08, 0.8), ("b", 2, 0.05, 0.8)]
    settings = [Priced(method, f"cut {cut}", cut * 1e6, mse, accuracy) for method, cut, mse, accuracy in found]
    draw_frontier(settings, 0.85, path)
    (axes,) = figures[0].axes
    lines = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
    assert lines == [[(1, 0.03), (2, 0.04)], []]
    assert {text.get_text(): text.xy for text in axes.texts} == {"cut 1": (1, 0.03), "cut 2": (2, 0.04)}
    assert [each.get_facecolors()[:, 3].tolist() for each in axes.collections] == [[1, 1, 1, 0.25], [0.25]]
    assert "at least 85.0 % accurate" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_frontier_names_clients_that_cost_and_leave_nearly_the_same_where_each_can_be_read(path, figures):
    settings = [Priced("a", f"cut 2, adapter {n}", (100 + n) * 1e6, 0.03, 0.9) for n in range(5)]
    draw_frontier(settings, 0.85, path)
    places = [Text.get_window_extent(text) for text in figures[0].axes[0].texts]
    assert len(places) == 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


CURVES = [attacker("_background_"), attacker("$5_bill$"), attacker("a$b"), attacker("two\nlines"), attacker("x" * 99)]
POINTS = [point(each["name"], lambd=0.0) for each in CURVES]


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (draw_tsne, [torch.randn(5, 4), torch.arange(5), [each["name"] for each in CURVES]]),
        (draw_attack_curves, [CURVES, {}]),
        (draw_tradeoff, [POINTS, {}]),
        (draw_frontier, [[Priced(each["name"], each["name"], 1e6, 0.1, 0.9) for each in CURVES], 0.5]),
        (draw_reconstructions, [IMAGES, {each["name"]: (IMAGES, None, None) for each in CURVES}]),
    ],
)
def test_names_from_outside_stand_there_as_they_are_on_one_line(path, figures, draw, arguments):
    draw(*arguments, path)
    texts = {text.get_text(): text for text in figures[0].findobj(Text)}
    shortened = next(name for name in texts if "x…x" in name)
    assert len(shortened) < 60
    for name in ("_background_", "$5_bill$", "a$b", "two lines", shortened):
        assert not texts[name].get_parse_math()


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (draw_curves, [[]], "no epochs"),
        (draw_tsne, [torch.randn(2, 4), torch.zeros(2).long(), NAMES], "at least 3 samples, got 2"),
        (draw_tsne, [torch.full((5, 4), torch.nan), torch.zeros(5).long(), NAMES], "not finite"),
        (draw_attack_curves, [[], {}], "no attackers"),
        (draw_tradeoff, [[], {}], "no runs"),
        (draw_frontier, [[], 0.9], "no settings"),
    ],
)
def test_what_cannot_be_drawn_is_refused(path, draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments, path)
