"""The Gaussian-mixture surrogate of the CEM paper: the control that attention is compared with."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from cem.surrogates.base import Surrogate
from cem.surrogates.kmeans import class_kmeans
from cem_kernels.validation import check_float, check_labels, check_not_negative, check_positive, check_sizes


class GaussianMixtureCEM(Surrogate):
    """Penalizes the variance of features around the mixture components of their own class.

    :meth:`refit` fits a mixture of ``k`` components to each class's training features after every epoch. In
    a step, every sample goes to the mean of its own class that is nearest in feature space (Euclidean,
    whichever the fit, as in the original). For each cluster ``j`` of class ``c`` with ``n_j > 0`` samples in
    the batch::

        v_j = mean over its samples and all columns of (z - mu_j)^2
        a_j = min(10 n_j / (pi_j N_c), 0.99)                  N_c: training samples of c at the last refit
        w_j = a_j v_j + (1 - a_j) v_stored_j
        penalty_c = sum_j pi_j relu(log(w_j + gamma) - log(var_threshold * reg_strength^2 + gamma))

    and ``rob_loss`` is the mean of ``penalty_c`` over the classes in the batch. A cluster that got no
    training sample has weight 0 and takes no sample in a step either: features could hide there.

    Source: "Theoretical Insights in Model Inversion Robustness and Conditional Entropy Maximization for
    Collaborative Inference Systems", CVPR 2025, arXiv:2503.00383v2, and its published code. Unlike there, the
    weight and the variance of a cluster are looked up by the sample's class and the centroid's own number.

    Args:
        feature_dim: width ``D`` of the flattened features.
        num_classes: ``K``.
        num_clusters: components per class, ``k``. The original takes 5 when the encoder ends in a sigmoid.
        var_threshold: tau, the tolerated ratio of feature variance to noise variance.
        reg_strength: sigma, the standard deviation of the noise added to features; may be 0.
        gamma: added to both variances inside the logarithms, so that neither is 0; positive.
        log_penalty: ``False`` takes ``sum_j pi_j (w_j + 0.001)`` instead: no logarithm, no threshold.
        max_iterations: Lloyd steps (``"kmeans"``) or EM steps (``"full"``) of one refit, at most.
        fit: ``"kmeans"``, in torch on the features' device, warm-started from the previous refit; or
            ``"full"``, scikit-learn's full-covariance mixture on the CPU after a PCA per class, started
            afresh every time. The penalty uses means, weights and traces of either; the full covariances speak
            in :meth:`information` alone, as in the original.
        pca_components: ``r``, directions kept per class by the ``"full"`` fit; default
            ``min(100, feature_dim)``. A class with fewer samples keeps as many as it has.

    Attributes:
        centroids: ``[K, k, D]``, component means.
        weights: ``[K, k]``, ``pi``; each fitted class's row sums to 1.
        variances: ``[K, k]``, ``v_stored``: mean variance per column, ``trace(Sigma_j) / D``.
        class_counts: ``[K]``, int64, ``N_c``; 0 for a class that was not fitted, which is not penalized.
        directions, covariances: ``[K, r, D]``, ``[K, k, r, r]``, ``"full"`` only: ``Sigma_j`` is
            ``directions[c].T @ covariances[c, j] @ directions[c]``. Rows beyond a class's rank are zero.

    All of these are buffers of static shape, so a state dict resumes a run exactly.

    Raises:
        ValueError: a size below 1, a negative or non-finite constant, an unknown ``fit``, or
            ``pca_components`` with ``fit="kmeans"`` or above ``feature_dim``.
    """

    needs_refit = True

    centroids: Tensor
    weights: Tensor
    variances: Tensor
    class_counts: Tensor
    directions: Tensor
    covariances: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        num_clusters: int = 15,
        var_threshold: float = 0.125,
        reg_strength: float = 0.025,
        gamma: float = 0.01,
        log_penalty: bool = True,
        max_iterations: int = 50,
        fit: Literal["kmeans", "full"] = "kmeans",
        pca_components: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            feature_dim=feature_dim, num_classes=num_classes, num_clusters=num_clusters, max_iterations=max_iterations
        )
        check_not_negative(var_threshold=var_threshold, reg_strength=reg_strength)
        check_positive(gamma=gamma)
        if fit not in ("kmeans", "full"):
            raise ValueError(f"fit must be 'kmeans' or 'full', got {fit!r}")
        if fit == "kmeans" and pca_components is not None:
            raise ValueError(f"pca_components={pca_components} needs fit='full', got fit='kmeans'")
        r = min(100, feature_dim) if pca_components is None else pca_components
        if not 1 <= r <= feature_dim:
            raise ValueError(f"pca_components must be in 1..feature_dim={feature_dim}, got {r}")

        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.num_clusters = num_clusters
        self.var_threshold = var_threshold
        self.reg_strength = reg_strength
        self.gamma = gamma
        self.log_penalty = log_penalty
        self.max_iterations = max_iterations
        self.fit = fit

        self.register_buffer("centroids", torch.zeros(num_classes, num_clusters, feature_dim))
        self.register_buffer("weights", torch.zeros(num_classes, num_clusters))
        self.register_buffer("variances", torch.zeros(num_classes, num_clusters))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        if fit == "full":
            self.register_buffer("directions", torch.zeros(num_classes, r, feature_dim))
            self.register_buffer("covariances", torch.zeros(num_classes, num_clusters, r, r))

    def forward(self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Penalty of a batch; no host sync on a GPU, no float atomics.

        Args:
            features: ``[B, D]`` or ``[B, C, H, W]`` with ``C·H·W = D``, any floating dtype.
            labels: ``[B]``, integer, in ``0..K-1`` (checked on the CPU only: elsewhere it would cost a sync).
            unique_labels: ``[U]``, integer: only these classes count; default: all.

        Returns:
            ``(rob_loss, intra_mse)``, 0-dim, fp32 (fp64 for fp64 features), differentiable in ``features``.
            ``intra_mse`` is the mean over columns of the squared distance to the nearest centroid, averaged
            within each class and then over classes. Samples of unfitted classes are left out; with no other
            sample both results are zero, and so is their gradient.

        Raises:
            ValueError: wrong rank, width, shape, device, or label out of range.
            TypeError: features not floating, or labels not integer.
        """
        z = self._flatten(features)
        labels = self._check_labels(labels, z)
        counted_class = self.class_counts > 0
        if unique_labels is not None:
            check_labels(unique_labels, self.num_classes)
            counted_class &= torch.zeros_like(counted_class).index_fill_(0, unique_labels.long(), True)
        counted = counted_class[labels]
        # A sample that does not count is replaced, not multiplied by zero: it may hold NaN or infinity.
        z = z.masked_fill(~counted[:, None], 0.0)

        with torch.no_grad():
            # Differences, not inner products: exact for tight clusters, also under autocast and with TF32.
            difference = self.centroids[labels].to(z.dtype).sub_(z[:, None])  # [B, k, D], so in place
            distance = torch.linalg.vector_norm(difference, dim=2)
            nearest = distance.masked_fill_(self.weights[labels] == 0, math.inf).argmin(1)
            mu = self.centroids[labels, nearest].to(z.dtype)
        squared = (z - mu).square().mean(1)  # [B]

        # Sums per cluster through a [B, K·k] mask: in a fixed order, which index_add_ on a GPU is not.
        cluster = labels * self.num_clusters + nearest
        member = cluster[:, None] == torch.arange(self.weights.numel(), device=cluster.device)
        member &= counted[:, None]
        n = member.sum(0).view_as(self.weights)
        total = torch.where(member, squared[:, None], 0.0).sum(0).view_as(self.weights)
        present = n.sum(1) > 0  # [K]
        num_present = present.sum().clamp(min=1)

        intra_mse = (total.sum(1) / n.sum(1).clamp(min=1)).sum() / num_present

        weights, stored = self.weights.to(z.dtype), self.variances.to(z.dtype)
        # At least 1 spares empty clusters 0 / 0, and changes no a: below 10 n_j it is 0.99 in any case.
        training_samples = (weights * self.class_counts[:, None]).clamp(min=1)
        a = (10 * n / training_samples).clamp(max=0.99)
        variance = a * (total / n.clamp(min=1)) + (1 - a) * stored
        if self.log_penalty:
            threshold = self.var_threshold * self.reg_strength**2
            penalty = (torch.log(variance + self.gamma) - math.log(threshold + self.gamma)).relu()
        else:
            penalty = variance + 0.001
        rob_loss = torch.where(n > 0, weights * penalty, 0.0).sum() / num_present
        return rob_loss, intra_mse

    @torch.no_grad()
    def refit(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Fit the mixture of each class to the whole training set's clean features.

        Random numbers (seeds of classes fitted for the first time; scikit-learn's ``random_state``) come from
        torch's global CPU generator, so that ``torch.manual_seed`` repeats a run on any device.

        Args:
            features: ``[N, D]`` or ``[N, C, H, W]``, any floating dtype, on any device: the fit runs there.
            labels: ``[N]``, integer, in ``0..K-1``, on that device. A class without samples becomes unfitted.

        Returns:
            ``information_nats``, see :meth:`information`, at the noise of ``reg_strength``; nothing without noise
            or without a sample.

        Raises:
            ValueError: wrong rank, width, shape, device, label out of range, or features that are not finite.
            TypeError: features not floating, or labels not integer.
        """
        x = self._flatten(features)
        labels = self._check_labels(labels, x)
        check_labels(labels.cpu(), self.num_classes)  # their range too, on every device: a refit may wait
        if len(x) > 0:
            low, high = (bound.item() for bound in torch.aminmax(x))  # NaN if there is one
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"features must be finite, got values from {low} to {high}")
        with torch.autocast(x.device.type, enabled=False):
            if self.fit == "full":
                self._refit_full(x, labels)
            else:
                self._refit_kmeans(x, labels)
        if self.reg_strength == 0 or len(x) == 0:
            return {}
        return {"information_nats": self.information(self.reg_strength)}

    def _refit_kmeans(self, x: Tensor, labels: Tensor) -> None:
        cold = (self.class_counts == 0).to(x.device)
        fit = class_kmeans(x, labels, self.centroids.to(x), cold, self.max_iterations)
        counts = fit.sizes.sum(1)
        self.centroids.copy_(fit.centroids)
        self.weights.copy_(fit.sizes.to(x.dtype) / counts.clamp(min=1)[:, None])
        self.variances.copy_(fit.variances)
        self.class_counts.copy_(counts)

    def _refit_full(self, x: Tensor, labels: Tensor) -> None:
        for buffer in self.buffers():
            buffer.zero_()  # no trace of the last fit where this one has fewer components or directions
        self.class_counts.copy_(labels.bincount(minlength=self.num_classes))
        for c in torch.nonzero(self.class_counts).flatten().tolist():
            mean, directions, means, covariances, weights = _fit_gaussian_mixture(
                x[labels == c], self.num_clusters, self.directions.shape[1], self.max_iterations
            )
            k, r = means.shape
            self.centroids[c, :k] = (mean + means @ directions).to(self.centroids)
            self.weights[c, :k] = weights.to(self.weights)
            self.directions[c, :r] = directions.to(self.directions)
            self.covariances[c, :k, :r, :r] = covariances.to(self.covariances)
        self.variances.copy_(self.covariances.diagonal(dim1=-2, dim2=-1).sum(-1) / self.feature_dim)

    @torch.no_grad()
    def covariance(self, label: int) -> Tensor:
        """Covariances ``[k, D, D]`` of one class's components in feature space.

        Isotropic for ``fit="kmeans"``; of rank ``r`` at most for ``fit="full"``.
        """
        if self.fit == "kmeans":
            identity = torch.eye(self.feature_dim).to(self.variances)
            return self.variances[label, :, None, None] * identity
        return self.directions[label].T @ self.covariances[label] @ self.directions[label]

    @torch.no_grad()
    def information(self, noise_std: float) -> float:
        """Bound [nats] on the information about the input in features sent with noise ``N(0, noise_std² I)``.

        ``sum_j pi_j (-log pi_j + ½ log |Sigma_j + s² I| / |s² I|)`` with ``s = noise_std``, averaged over the
        fitted classes: Eq. 7 of arXiv:2503.00383v2. It speaks of the fitted mixture, which the features need
        not follow: nothing is certified.

        ``fit="full"`` takes the determinant on the ``r`` kept directions (on all others ``Sigma_j`` is 0 and
        the ratio 1) by Cholesky in fp64. Where that fails, because ``Sigma_j`` is not positive semi-definite,
        the diagonal stands in: for a definite matrix its product is never below the determinant (Hadamard).
        ``fit="kmeans"`` takes ``Sigma_j = v_stored_j I``.

        Raises:
            ValueError: ``noise_std`` is not positive and finite; without noise the bound is infinite.
            RuntimeError: nothing was fitted yet.
        """
        if not 0 < noise_std < math.inf:
            raise ValueError(f"noise_std must be positive and finite, got {noise_std}")
        fitted = self.class_counts > 0
        if not fitted.any():
            raise RuntimeError("information() needs a fitted mixture: call refit() first")
        if self.fit == "kmeans":
            log_ratio = self.feature_dim * torch.log1p(self.variances.double() / noise_std**2)
        else:
            scaled = self.covariances.double() / noise_std**2
            identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
            factor, failed = torch.linalg.cholesky_ex(scaled + identity)
            exact = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            diagonal = scaled.diagonal(dim1=-2, dim2=-1).clamp(min=0).log1p().sum(-1)
            log_ratio = torch.where(failed > 0, diagonal, exact)
        weights = self.weights.double()
        per_class = (weights * log_ratio / 2 - torch.xlogy(weights, weights)).sum(1)
        return per_class[fitted].mean().item()

    def _flatten(self, features: Tensor) -> Tensor:
        """``[B, D]`` in fp32 or wider."""
        check_float("features", features)
        if features.dim() not in (2, 4) or math.prod(features.shape[1:]) != self.feature_dim:
            raise ValueError(
                f"features must have shape [B, D={self.feature_dim}] or [B, C, H, W] with "
                f"C*H*W = {self.feature_dim}, got {list(features.shape)}"
            )
        return features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))

    def _check_labels(self, labels: Tensor, z: Tensor) -> Tensor:
        """The labels of ``z``, int64."""
        check_labels(labels, self.num_classes)
        if labels.shape != z.shape[:1]:
            raise ValueError(f"labels must have shape [B={len(z)}], got {list(labels.shape)}")
        if labels.device != z.device:
            raise ValueError(f"labels must be on the features' device {z.device}, got {labels.device}")
        return labels.long()


def _fit_gaussian_mixture(
    x: Tensor, num_clusters: int, pca_components: int, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PCA and full-covariance EM on one class's samples ``x [n, D]``, by scikit-learn, on the CPU in fp64.

    Returns the class mean ``[D]``, directions ``[r', D]``, and in their coordinates the means ``[k', r']``,
    covariances ``[k', r', r']`` and weights ``[k']`` of ``k' <= num_clusters`` components: no more than there
    are distinct samples. A single distinct sample is a point: one component of covariance 0.
    """
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    random_state = int(torch.randint(2**31 - 1, ()))
    rows = x.double().cpu().numpy()
    distinct = len(np.unique(rows, axis=0))
    if distinct == 1:
        zero = x.new_zeros(1, 1, 1)
        return x[0], x.new_zeros(1, x.shape[1]), zero[0], zero, x.new_ones(1)
    pca = PCA(min(pca_components, *rows.shape), random_state=random_state)
    mixture = GaussianMixture(
        min(num_clusters, distinct),
        covariance_type="full",
        reg_covar=1e-4,
        max_iter=max_iterations,
        random_state=random_state,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the cap on EM steps is asked for
        mixture.fit(pca.fit_transform(rows))
    parts = (pca.mean_, pca.components_, mixture.means_, mixture.covariances_, mixture.weights_)
    mean, directions, means, covariances, weights = (torch.from_numpy(part) for part in parts)
    return mean, directions, means, covariances, weights
