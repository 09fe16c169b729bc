"""How much features tell about an image, in nats: an upper estimate from their spread, without any attack."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from cem.progress import over
from cem.surrogates import CONTROL, SURROGATES
from cem.surrogates.kmeans import class_kmeans
from cem.terms import Context
from cem.training.evaluation import isolated_random

CLUSTERS = (1, 5, 15)  # per class
FEWEST = 10  # samples; a variance from fewer is not worth having
LLOYD_STEPS = 20  # at most; any partition gives a bound, a converged one hardly a better one

NOTE = (
    "An upper estimate of I(x; z), not a certificate: H(x) is unknown, and the variances come from a sample, the less "
    "certain the fewer of it fall into a cluster. Only the difference between runs on the same data speaks."
)


@torch.no_grad()
def information_report(
    features: Tensor, labels: Tensor, *, context: Context, queries: int, seed: int
) -> dict[str, Any]:
    """What the clean features of a run's training images say about the images once noise is added.

    Let ``z = f(x) + n`` with ``n ~ N(0, σ²I)``, and let ``j`` number the cells of any partition of the images,
    ``π_j`` their shares, ``v_jD`` the variance of column ``D`` of ``f(x)`` inside one. Then::

        I(x; z) = I(x, j; z) = I(j; z) + I(x; z | j)          j is a function of x; chain rule
        I(j; z) ≤ H(j) = −Σ_j π_j log π_j
        I(x; z | j) = Σ_j π_j [h(z | j) − h(n)]               given x, only n is random
        h(z | j) ≤ Σ_D ½ log 2πe (v_jD + σ²)                  most for independent Gaussians of these variances
        I(x; z) ≤ Σ_j π_j [−log π_j + ½ Σ_D log(1 + v_jD / σ²)]

    The cells are classes, or clusters of a class (k-means); the smallest value over :data:`CLUSTERS` is
    reported. An attacker who averages ``R`` queries faces noise ``σ/√R``.

    Small samples make such a figure too small, in three ways, and each is met:

    * k-means fits its centroids to the very samples: centroids come from one half of the samples (of each
      class), shares and variances from the other, and the two ways round are averaged;
    * the logarithm of an estimated variance is too small on average; its first-order bias for ``n_j`` Gaussian
      samples, ``½ (v/(v + σ²))² / (n_j − 1)`` a column, is added; variances are unbiased;
    * cells of fewer than 10 samples are joined into one (if that has fewer as well, it joins the largest), and
      a number of clusters that leaves fewer than 10 samples a cell on average is left out.

    ``values`` holds what each surrogate says, measured alike whatever the run was trained with, so that it can
    be ranked against measured errors. More means that more of an image gets through. ``None`` without noise,
    but for the last.

    * by its name, every surrogate that can be assessed: its value at ``σ``, with its default options, untrained and
      refitted here, see :meth:`cem.Term.assess`;
    * ``log_det``: ``½ log det(I + Cov/σ²)`` of each class's samples, weighted by them: nats as ``nats`` with a single
      cluster, but for the entropy of the class, and counting what columns have in common once.

    Source: Eq. 7 of arXiv:2503.00383v2, with variances per column.

    Args:
        features: ``[N, ...]``, clean (before noise), floating, ``N ≥ 2``. Statistics are taken in fp64.
        labels: ``[N]``, int64, in ``0..num_classes-1``, on the features' device.
        context: of the run: shapes, classes and ``σ`` of one query; 0 for none.
        queries: ``R``, how many noisy answers the attacker averages.
        seed: of halves, k-means seeds, batches and surrogates' weights. Random states stay as they are.

    Returns:
        Plain numbers: ``nats`` (``None`` without noise: unbounded), ``clusters`` (the ``k`` that gave it),
        ``noise_std`` (``σ/√R``), ``queries``, ``per_clusters`` (nats by ``k``; ``None`` if left out),
        ``feature_dims``, ``image_dims``, ``values``, ``note``;
        ``within_variance`` and ``between_variance``, the variance inside classes and that of their means, weighted by
        their samples, both a mean over columns and in squared units of features: what of the features is left.

    Raises:
        ValueError: a shape, size or number cannot be used, or a feature is not finite.
    """
    noise_std, num_classes, feature_shape = context.noise_std, context.num_classes, context.feature_shape
    if not (0 <= noise_std < math.inf and queries >= 1):
        raise ValueError(f"noise_std must be finite and at least 0, queries at least 1, got {noise_std=} {queries=}")
    x = features.flatten(1).float()
    if len(x) < 2 or labels.shape != x.shape[:1] or math.prod(feature_shape) != x.shape[1]:
        raise ValueError(
            f"expected at least 2 samples of shape {tuple(feature_shape)}, each with a label, got features "
            f"{tuple(features.shape)} and labels {tuple(labels.shape)}"
        )
    if not all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(x)).tolist()):
        raise ValueError("features must be finite")

    effective_std = noise_std / math.sqrt(queries)
    with isolated_random(seed, x.device):
        clusterings = over(CLUSTERS, "information")
        per_clusters = {k: _nats(x, labels, num_classes, k, effective_std) for k in clusterings}
    known = {k: nats for k, nats in per_clusters.items() if nats is not None}
    clusters = min(known, key=known.__getitem__, default=None)
    nats = None if clusters is None else known[clusters]

    within, between = _variances(x, labels)
    values: dict[str, float | None] = {}
    for name in over([each for each in SURROGATES if each != CONTROL], "surrogates' values"):
        values[name] = None
        if noise_std > 0:
            with isolated_random(seed, x.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that something swamps the threshold
                surrogate = SURROGATES.build(name, context).to(x.device)
                values[name] = surrogate.assess(x.unflatten(1, feature_shape), labels)
    return {
        "nats": nats,
        "clusters": clusters,
        "noise_std": effective_std,
        "queries": queries,
        "per_clusters": {str(k): value for k, value in per_clusters.items()},
        "feature_dims": x.shape[1],
        "image_dims": math.prod(context.image_shape),
        "values": {**values, "log_det": _log_det(x, labels, noise_std)},
        "within_variance": within,
        "between_variance": between,
        "note": NOTE,
    }


def _nats(x: Tensor, labels: Tensor, num_classes: int, clusters: int, noise_std: float) -> float | None:
    """The estimate with so many clusters per class, or ``None`` without noise or with too few samples."""
    if noise_std == 0:
        return None
    if clusters == 1:
        return _bound(x, labels, noise_std)
    cells = clusters * len(labels.unique())
    if len(x) / 2 < FEWEST * cells:
        return None
    # Neighbors in an order by class go to different halves, so each half has its share of every class.
    order = torch.randperm(len(x)).to(x.device)
    order = order[labels[order].argsort(stable=True)]
    halves = order[::2], order[1::2]
    cold = torch.ones(num_classes, dtype=torch.bool, device=x.device)
    total = 0.0
    for fitted, measured in (halves, halves[::-1]):
        start = x.new_zeros(num_classes, clusters, x.shape[1])
        centroids = class_kmeans(x[fitted], labels[fitted], start, cold, LLOYD_STEPS).centroids
        total += _bound(x[measured], _nearest(x[measured], labels[measured], centroids), noise_std) / 2
    return total


def _nearest(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """``[N]``: the center of a cluster of its own class that is nearest to each sample, numbered across classes."""
    cells = torch.empty_like(labels)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        distance = torch.cdist(x[rows].double(), centroids[label].double())
        cells[rows] = label * centroids.shape[1] + distance.argmin(1)
    return cells


def _bound(x: Tensor, cells: Tensor, noise_std: float) -> float:
    """``Σ_j π_j [−log π_j + ½ Σ_D log(1 + v_jD / σ²)]`` of samples ``[N, D]`` in cells ``[N]``, bias corrected."""
    sizes = cells.bincount()
    small = sizes[cells] < FEWEST
    cells = cells.masked_fill(small, len(sizes) if small.sum() >= FEWEST else int(sizes.argmax()))
    total = 0.0
    for rows in _members(cells):
        share = len(rows) / len(x)
        ratio = x[rows].double().var(0) / noise_std**2
        bias = (ratio / (1 + ratio)).square() / (len(rows) - 1)
        total += share * (-math.log(share) + 0.5 * (ratio.log1p() + bias).sum().item())
    return total


def _log_det(x: Tensor, labels: Tensor, noise_std: float) -> float | None:
    """``½ log det(I + Cov/σ²)`` of each class, weighted by its samples; ``None`` without noise or without a pair."""
    total, samples = 0.0, 0
    for rows in _members(labels):
        if noise_std == 0 or len(rows) < 2:
            continue
        of_class = x[rows].double()
        away = (of_class - of_class.mean(0)) / (noise_std * math.sqrt(len(rows) - 1))
        # The determinants of I + AᵀA and I + AAᵀ are one; the smaller matrix is enough.
        gram = away @ away.T if len(rows) < away.shape[1] else away.T @ away
        total += len(rows) * torch.linalg.slogdet(torch.eye(len(gram)).to(gram) + gram)[1].item() / 2
        samples += len(rows)
    return total / samples if samples else None


def _variances(x: Tensor, labels: Tensor) -> tuple[float, float]:
    """``within_variance`` and ``between_variance``, see :func:`information_report`."""
    away = x.double()
    means = torch.zeros_like(away)
    for rows in _members(labels):
        means[rows] = away[rows].mean(0)
    return (away - means).square().mean().item(), (means - means.mean(0)).square().mean().item()


def _members(cells: Tensor) -> list[Tensor]:
    """The samples of each cell that has any, as indices."""
    members = cells.argsort(stable=True).split(cells.bincount().tolist())
    return [rows for rows in members if len(rows) > 0]
