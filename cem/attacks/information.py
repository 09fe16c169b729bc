"""How much features tell about an image, in nats: an upper estimate from their spread, without any attack."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cem.surrogates import build_surrogate
from cem.surrogates.build import ORIGINAL
from cem.surrogates.kmeans import class_kmeans
from cem.training.evaluation import isolated_random

CLUSTERS = (1, 5, 15)  # per class
FEWEST = 10  # samples; a variance from fewer is not worth having
LLOYD_STEPS = 20  # at most; any partition gives a bound, a converged one hardly a better one
BATCH = 128  # samples, as the surrogates see them in training by default
NEGLIGIBLE = 1e-3  # of σ²: a column that varies by less inside a class counts as varying by so much

_SLOTS = {**ORIGINAL, "measure": "slots"}
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", ORIGINAL),
    "slots": ("attention", _SLOTS),
    "slots_entropy": ("attention", {**_SLOTS, "penalty": "entropy"}),
    "class_hinge": ("attention", {**_SLOTS, "num_slots": 1, "gamma": 0.01}),
    "class_entropy": ("attention", {**_SLOTS, "num_slots": 1, "penalty": "entropy"}),
    "gmm": ("gmm", {}),
}
"""Surrogates whose value is reported: its name there, that of the surrogate, its options."""

NOTE = (
    "An upper estimate of I(x; z), not a certificate: H(x) is unknown, and the variances come from a sample, the less "
    "certain the fewer of it fall into a cluster. Only the difference between runs on the same data speaks."
)


@torch.no_grad()
def information_report(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    noise_std: float,
    queries: int,
    image_dims: int,
    var_threshold: float,
    feature_shape: tuple[int, ...],
    sigmoid: bool,
    seed: int,
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

    * ``attention``, ``slots``, ``slots_entropy``, ``class_hinge``, ``class_entropy``, ``gmm``: ``rob_loss`` of that
      surrogate at ``σ``, mean over batches of 128 at random: the original attention; ``measure="slots"`` with either
      penalty; the same two around one slot, the class, the hinge with the mixture's ``γ``; all with untrained weights;
      and the mixture, refitted here;
    * ``nats``: the figure above;
    * ``class_log_variance``: mean over classes and columns of ``log(v / σ² + 1e-3)``, ``v`` the variance inside the
      class; classes with a single sample are left out;
    * ``relative_variance``: variance inside classes over total variance, both summed over columns.

    Source: Eq. 7 of arXiv:2503.00383v2, with variances per column.

    Args:
        features: ``[N, ...]``, clean (before noise), floating, ``N ≥ 2``. Statistics are taken in fp64.
        labels: ``[N]``, int64, in ``0..num_classes-1``, on the features' device.
        num_classes: ``K``; classes may be empty.
        noise_std: ``σ`` in feature units, of one query; 0 for none.
        queries: ``R``, how many noisy answers the attacker averages.
        image_dims: ``d``, channels times pixels of an image; only handed through, for :func:`relative_to`.
        var_threshold: ``τ`` of the surrogates.
        feature_shape: of one sample's features, ``(C, H, W)`` or ``(D,)``.
        sigmoid: whether the encoder ends in a sigmoid, see :func:`cem.surrogates.build_surrogate`.
        seed: of halves, k-means seeds, batches and attention's weights. Random states stay as they are.

    Returns:
        Plain numbers: ``nats`` (``None`` without noise: unbounded), ``clusters`` (the ``k`` that gave it),
        ``noise_std`` (``σ/√R``), ``queries``, ``per_clusters`` (nats by ``k``; ``None`` if left out),
        ``feature_dims``, ``image_dims``, ``relative`` (``None``, see :func:`relative_to`), ``values``, ``note``;
        ``within_variance`` and ``between_variance``, the variance inside classes and that of their means, weighted by
        their samples, both a mean over columns and in squared units of features: what of the features is left.

    Raises:
        ValueError: a shape, size or number cannot be used, or a feature is not finite.
    """
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
        per_clusters = {k: _nats(x, labels, num_classes, k, effective_std) for k in CLUSTERS}
    known = {k: nats for k, nats in per_clusters.items() if nats is not None}
    clusters = min(known, key=known.__getitem__, default=None)
    nats = None if clusters is None else known[clusters]

    class_log_variance, within, between = _class_variances(x, labels, noise_std)
    penalties: dict[str, float | None] = {}
    for name, (kind, options) in MEASURED.items():
        penalties[name] = None
        if noise_std > 0:
            with isolated_random(seed, x.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that eps_var swamps the threshold
                surrogate = build_surrogate(
                    kind,
                    **options,
                    feature_shape=feature_shape,
                    num_classes=num_classes,
                    noise_std=noise_std,
                    var_threshold=var_threshold,
                    sigmoid=sigmoid,
                ).to(x.device)
                surrogate.eval().refit(x, labels)
                order = torch.randperm(len(x)).to(x.device)
                losses = [surrogate(x[rows], labels[rows])[0].item() * len(rows) for rows in order.split(BATCH)]
                penalties[name] = sum(losses) / len(x)
    return {
        "nats": nats,
        "clusters": clusters,
        "noise_std": effective_std,
        "queries": queries,
        "per_clusters": {str(k): value for k, value in per_clusters.items()},
        "feature_dims": x.shape[1],
        "image_dims": image_dims,
        "relative": None,
        "values": {
            **penalties,
            "nats": nats,
            "class_log_variance": class_log_variance,
            "relative_variance": within / (within + between) if within + between > 0 else None,
        },
        "within_variance": within,
        "between_variance": between,
        "note": NOTE,
    }


def relative_to(report: Mapping[str, Any], reference_report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The report of :func:`information_report`, with its ``relative`` filled in.

    ``H(x|z) = H(x) − I(x; z)`` bounds the squared error per dimension of every attacker from below, by
    ``exp(2 H(x|z) / d) / 2πe``. ``H(x)`` is unknown but the same for both runs, so it cancels in the ratio of
    their bounds, ``factor = exp(−2 (I − I_reference) / d)``: above 1, this run promises more than the reference.

    Args:
        report: of the run.
        reference_report: of another run on the same images.
        name: of that run.

    Returns:
        A copy with ``relative = {"reference": name, "factor": ...}``; the factor is ``None`` where one of the
        two has no noise, or where it is too large for a float.

    Raises:
        ValueError: the images of the two differ in size.
    """
    if report["image_dims"] != reference_report["image_dims"]:
        raise ValueError(
            f"runs on images of {report['image_dims']} and of {reference_report['image_dims']} dimensions "
            "do not compare"
        )
    factor = bound_ratio(report["nats"], reference_report["nats"], report["image_dims"])
    return {**report, "relative": {"reference": name, "factor": factor}}


def bound_ratio(nats: float | None, reference_nats: float | None, image_dims: int) -> float | None:
    """``exp(−2 (I − I_reference) / d)``; ``None`` where an ``I`` is, or where it is too large for a float."""
    if nats is None or reference_nats is None:
        return None
    exponent = -2 * (nats - reference_nats) / image_dims
    return math.exp(exponent) if exponent < 700 else None


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
    """``[N]``: the centroid of its own class that is nearest to each sample, numbered across classes."""
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


def _class_variances(x: Tensor, labels: Tensor, noise_std: float) -> tuple[float | None, float, float]:
    """``class_log_variance``, ``within_variance`` and ``between_variance``, see :func:`information_report`."""
    logarithms: list[Tensor] = []
    means, shares = [], []
    within = 0.0
    for rows in _members(labels):
        samples = x[rows].double()
        shares.append(len(rows) / len(x))
        means.append(samples.mean(0))
        within += shares[-1] * samples.var(0, correction=0).mean().item()
        if noise_std > 0 and len(rows) > 1:
            logarithms.append((samples.var(0) / noise_std**2 + NEGLIGIBLE).log().mean())
    overall = sum(share * mean for share, mean in zip(shares, means, strict=True))
    between = sum(share * (mean - overall).square().mean().item() for share, mean in zip(shares, means, strict=True))
    log_variance = torch.stack(logarithms).mean().item() if logarithms else None
    return log_variance, within, between


def _members(cells: Tensor) -> list[Tensor]:
    """The samples of each cell that has any, as indices."""
    members = cells.argsort(stable=True).split(cells.bincount().tolist())
    return [rows for rows in members if len(rows) > 0]
