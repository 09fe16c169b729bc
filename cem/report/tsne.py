"""A map of the features that leave the client, colored by class."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from cem.progress import bar
from cem.report.figure import add_legend, new_figure, plain, save_figure

MAX_SAMPLES = 1000
"""More points make the map slower to compute and no clearer."""

_LEGEND_CLASSES = 20
_ITERATIONS = 1000


class _Follower(io.StringIO):
    """Moves a bar by what scikit-learn prints of its iterations."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        found = re.search(r"Iteration (\d+)", text)
        if found:
            self._shown.n = int(found[1])
            self._shown.refresh()  # some twenty times in all
        return len(text)


def draw_tsne(features: Tensor, labels: Tensor, class_names: Sequence[str], path: Path, *, seed: int = 0) -> None:
    """Draw a t-SNE map of the first :data:`MAX_SAMPLES` features.

    Args:
        features: ``[N, ...]``, as the server receives them; flattened.
        labels: ``[N]``, indices into ``class_names``.
        class_names: a name per class. Up to 20 classes get a legend, more only a color scale.
        path: the PNG to write.
        seed: of the map.

    Raises:
        ValueError: if there are fewer than 3 samples, or a feature is not finite.
    """
    # Slow to import, and only this picture needs it.
    from sklearn.manifold import TSNE

    points = features[:MAX_SAMPLES].detach().flatten(1).float().cpu().numpy()
    classes = labels[:MAX_SAMPLES].cpu().numpy()
    if len(points) < 3:
        raise ValueError(f"a map needs at least 3 samples, got {len(points)}")
    if not np.isfinite(points).all():
        raise ValueError("the features are not finite")
    # t-SNE refuses a perplexity that is not below the number of samples.
    perplexity = min(30.0, (len(points) - 1) / 3)
    start = "pca" if min(points.shape) >= 2 else "random"
    with bar(_ITERATIONS, "t-SNE") as shown:
        # What it prints of its progress nobody reads where there is no bar.
        said, verbose = (None, 0) if shown.disable else (_Follower(shown), 2)
        tsne = TSNE(perplexity=perplexity, max_iter=_ITERATIONS, init=start, random_state=seed, verbose=verbose)
        with redirect_stdout(said or sys.stdout):
            x, y = tsne.fit_transform(points).T

    figure = new_figure(8, 6.4)
    axes = figure.subplots()
    few = len(class_names) <= _LEGEND_CLASSES
    palette = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20" if few else "turbo"]
    if few:
        entries = []
        for index, name in enumerate(class_names):
            of_class = classes == index
            if of_class.any():
                entries.append((name, axes.scatter(x[of_class], y[of_class], s=14, color=palette(index), lw=0)))
        add_legend(axes, entries, title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    else:
        drawn = axes.scatter(x, y, s=14, c=classes, cmap=palette, linewidths=0)
        figure.colorbar(drawn, ax=axes, label="class")
    axes.set_title(f"t-SNE of {len(points)} noisy features, {points.shape[1]} values each", fontsize=11)
    # The axes of a t-SNE map have no unit and no meaning; only neighborhoods do.
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    plain(axes, grid=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    save_figure(figure, path)
