"""Lloyd's k-means inside every class at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class KMeansFit(NamedTuple):
    """``k`` clusters of each of ``K`` classes; entry ``[c, j]`` of a field is centroid ``j`` of class ``c``.

    A cluster without samples has size 0 and variance 0, and its centroid stays where it was.
    """

    centroids: Tensor
    """``[K, k, D]``."""
    sizes: Tensor
    """``[K, k]``, int64: samples of each cluster."""
    variances: Tensor
    """``[K, k]``: mean over a cluster's samples and over columns of the squared distance to the centroid."""


def class_kmeans(features: Tensor, labels: Tensor, centroids: Tensor, cold: Tensor, max_iterations: int) -> KMeansFit:
    """Cluster the samples of each class, all classes in step.

    Args:
        features: ``[N, D]``, fp32 or fp64, finite; one copy of it is made.
        labels: ``[N]``, int64, in ``0..K-1``, on the features' device.
        centroids: ``[K, k, D]``, where to start; same dtype and device as ``features``.
        cold: ``[K]``, bool: classes that start from k-means++ seeds instead. Only these draw random numbers,
            from torch's global CPU generator.
        max_iterations: Lloyd steps at most. All classes stop together, when no sample of any changes cluster.
    """
    num_classes, num_clusters, _ = centroids.shape
    order = labels.argsort(stable=True)
    labels, x = labels[order], features[order]
    # Centered per class: distances are about to be taken from inner products, which lose the small differences
    # between clusters when the class lies far from the origin (all the more in TF32).
    class_means, class_counts = _segment_mean(x, labels, num_classes)
    x_of_class = x.split(class_counts.tolist())
    for x_c, mean in zip(x_of_class, class_means, strict=True):
        x_c.sub_(mean)
    centroids = centroids - class_means[:, None]
    for c in torch.nonzero(cold & (class_counts > 0)).flatten().tolist():
        centroids[c] = _kmeans_plus_plus(x_of_class[c], num_clusters)

    def nearest(centroids: Tensor) -> Tensor:
        """``[N]``: the centroid of its own class that is nearest to each sample, numbered across classes."""
        dots = torch.cat([x_c @ mu.T for x_c, mu in zip(x_of_class, centroids, strict=True)])
        half_norms = centroids.square().sum(-1) / 2
        return labels * num_clusters + (half_norms[labels] - dots).argmin(1)

    cluster = nearest(centroids)
    for _ in range(max_iterations):
        means, sizes = _segment_mean(x, cluster, num_classes * num_clusters)
        centroids = torch.where(sizes[:, None] > 0, means, centroids.flatten(0, 1)).view_as(centroids)
        previous, cluster = cluster, nearest(centroids)
        if torch.equal(cluster, previous):
            break

    squared = (x - centroids.flatten(0, 1)[cluster]).square_().mean(1, keepdim=True)
    variances, sizes = _segment_mean(squared, cluster, num_classes * num_clusters)
    shape = (num_classes, num_clusters)
    return KMeansFit(centroids + class_means[:, None], sizes.view(shape), variances.view(shape))


def _segment_mean(rows: Tensor, segment: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Means ``[num_segments, D]`` (0 where empty) and sizes of the rows ``[N, D]`` of each segment.

    An embedding bag reads each row once and adds without atomics, so that the same call gives the same bits
    on a GPU too; ``index_add_`` does not, and a one-hot matrix product does ``num_segments`` times the work.
    """
    sizes = segment.bincount(minlength=num_segments)
    starts = sizes.cumsum(0) - sizes
    return F.embedding_bag(segment.argsort(stable=True), rows, starts, mode="mean"), sizes


def _kmeans_plus_plus(x: Tensor, num_clusters: int) -> Tensor:
    """Seeds ``[k, D]`` from the samples ``x [n, D]``, ``n >= 1``.

    The first is drawn uniformly, each next one with probability proportional to its *distance* to the nearest
    seed so far, as in the published code of the CEM paper (arXiv:2503.00383); k-means++ proper (Arthur and
    Vassilvitskii, 2007) takes the squared distance. Once every sample coincides with a seed, the first sample
    is taken again.
    """
    chosen = [torch.randint(len(x), (1,)).to(x.device)]
    distance = x.new_full((len(x),), float("inf"))
    for _ in range(1, num_clusters):
        distance = torch.minimum(distance, torch.linalg.vector_norm(x - x[chosen[-1]], dim=1))
        # The argmax of p / Exp(1) falls on an index with probability p: CPU random numbers, no host sync.
        waiting = torch.empty(len(x), dtype=x.dtype).exponential_().to(x.device)
        chosen.append((distance / waiting).argmax(0, keepdim=True))
    return x[torch.cat(chosen)]
