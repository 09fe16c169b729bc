"""The Gaussian-mixture surrogate of the CEM paper: the control that attention is compared with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from cem.errors import BackendError, UsageError
from cem.options import Options as BaseOptions
from cem.options import option
from cem.surrogates.base import Surrogate
from cem.surrogates.kmeans import class_kmeans
from cem.terms import Batch, Context, Measured
from cem_kernels.validation import as_labels, check_not_negative, check_positive, check_sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_DIRECTIONS = 100  # kept per class by the full fit


class GaussianMixtureCEM(Surrogate):
    """Penalizes the variance of features around the mixture components of their own class.

    :meth:`after_epoch` fits a mixture of ``k`` components to each class's training features after every epoch. In
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
        max_iterations: Lloyd steps (``"kmeans"``) or EM steps (``"full"``) of one refit, at most.
        fit: ``"kmeans"``, in torch on the features' device, warm-started from the previous refit; or
            ``"full"``, scikit-learn's full-covariance mixture on the CPU after a PCA per class, started
            afresh every time. The penalty uses means, weights and traces of either; the full covariances speak
            in :meth:`information` alone, as in the original.
        process_group: see :class:`~cem.Term`.

    Attributes:
        centroids: ``[K, k, D]``, component means.
        weights: ``[K, k]``, ``pi``; each fitted class's row sums to 1.
        variances: ``[K, k]``, ``v_stored``: mean variance per column, ``trace(Sigma_j) / D``.
        class_counts: ``[K]``, int64, ``N_c``; 0 for a class that was not fitted, which is not penalized.
        directions, covariances: ``[K, r, D]``, ``[K, k, r, r]``, ``"full"`` only: ``Sigma_j`` is
            ``directions[c].T @ covariances[c, j] @ directions[c]``. Rows beyond a class's rank are zero.

    All of these are buffers of static shape, so a state dict resumes a run exactly.

    Features are ``[B, D]`` or ``[B, C, H, W]`` with as many numbers, of any floating dtype; losses are fp32 (fp64 for
    fp64 features). Samples of classes that no fit has seen are left out; with no other sample the losses are zero.

    Warns:
        UserWarning: it is asked in training before any fit.

    Raises:
        ValueError: a size below 1, a negative or non-finite constant, or an unknown ``fit``.

    Example::

        >>> import torch, cem
        >>> surrogate = cem.GaussianMixtureCEM(feature_dim=4, num_classes=2, num_clusters=3, reg_strength=0.1)
        >>> features, labels = torch.randn(40, 4), torch.arange(40) % 2
        >>> nats = surrogate.after_epoch(features, labels)["information_nats"]
        >>> rob_loss, intra_mse = surrogate(features.requires_grad_(), labels)
        >>> rob_loss.backward()
    """

    name = "mixture"
    summary = "a Gaussian mixture per class, refitted after every epoch: the penalty of the CEM paper"
    schedule = "rising"
    needs_epoch_features = True
    capturable = False

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of ``--surrogate mixture``.

        Attributes:
            clusters: Components per class; without it 5 where the encoder ends in a sigmoid, else 15.
            var_threshold: Variance around a component that is tolerated, in units of the noise's variance.
            gamma: Variance added inside both logarithms.
            fit: kmeans: k-means++ in PyTorch, on the training device. full: scikit-learn on the CPU, with a PCA and
                full covariances; slower.
        """

        weight: ClassVar[float] = 16.0
        clusters: int | None = option(None, least=1)
        var_threshold: float = option(0.125, least=0)
        gamma: float = option(0.01, above=0)
        fit: Literal["kmeans", "full"] = option("kmeans")

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
        max_iterations: int = 50,
        fit: Literal["kmeans", "full"] = "kmeans",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group=process_group)
        check_sizes(
            feature_dim=feature_dim, num_classes=num_classes, num_clusters=num_clusters, max_iterations=max_iterations
        )
        check_not_negative(var_threshold=var_threshold, reg_strength=reg_strength)
        check_positive(gamma=gamma)
        if fit not in ("kmeans", "full"):
            raise ValueError(f"fit must be 'kmeans' or 'full', got {fit!r}")
        self.feature_dim, self.num_classes, self.num_clusters = feature_dim, num_classes, num_clusters
        self.var_threshold, self.reg_strength, self.gamma = var_threshold, reg_strength, gamma
        self.max_iterations, self.fit, self._asked = max_iterations, fit, False
        self.register_buffer("centroids", torch.zeros(num_classes, num_clusters, feature_dim))
        self.register_buffer("weights", torch.zeros(num_classes, num_clusters))
        self.register_buffer("variances", torch.zeros(num_classes, num_clusters))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        if fit == "full":
            r = min(MOST_DIRECTIONS, feature_dim)
            self.register_buffer("directions", torch.zeros(num_classes, r, feature_dim))
            self.register_buffer("covariances", torch.zeros(num_classes, num_clusters, r, r))

    @classmethod
    def build(cls, options: Options, context: Context) -> GaussianMixtureCEM:
        """See :class:`~cem.Surrogate`."""
        if context.backend == "triton":
            raise BackendError(f"the surrogate {cls.name} has no 'triton' backend: it is plain PyTorch")
        return cls(
            torch.Size(context.feature_shape).numel(),
            context.num_classes,
            num_clusters=options.clusters or (5 if context.bounded else 15),
            var_threshold=options.var_threshold,
            reg_strength=context.noise_std,
            gamma=options.gamma,
            fit=options.fit,
        )

    def measure(self, batch: Batch) -> Measured:
        """See :class:`~cem.Surrogate`; no host sync on a GPU, no float atomics.

        ``intra_mse`` is the mean over columns of the squared distance to the nearest centroid, averaged within each
        class and then over classes.
        """
        z, labels = self._checked(batch.features, batch.labels)
        self._warn_without_a_fit()
        inside = (labels >= 0) & (labels < self.num_classes)
        labels = torch.where(inside, labels, 0)
        counted = inside & (self.class_counts > 0)[labels]
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
        threshold = self.var_threshold * self.reg_strength**2
        penalty = (torch.log(variance + self.gamma) - math.log(threshold + self.gamma)).relu()
        rob_loss = torch.where(n > 0, weights * penalty, 0.0).sum() / num_present
        return Measured(rob_loss, {"intra_mse": intra_mse})

    def after_epoch(self, features: Tensor, labels: Tensor) -> Mapping[str, float]:
        """Refit, see :meth:`refit`.

        Returns:
            ``information_nats``, see :meth:`information`, at the noise of ``reg_strength``; nothing without noise
            or without a sample.
        """
        self.refit(features, labels)
        if self.reg_strength == 0 or not self.class_counts.any():
            return {}
        return {"information_nats": self.information(self.reg_strength)}

    @torch.no_grad()
    def refit(self, features: Tensor, labels: Tensor) -> None:
        """Fit the mixture of each class to the whole training set's clean features.

        Random numbers (seeds of classes fitted for the first time; scikit-learn's ``random_state``) come from
        torch's global CPU generator, so that ``torch.manual_seed`` repeats a run on any device.

        Args:
            features: ``[N, D]`` or ``[N, C, H, W]``, any floating dtype, on any device: the fit runs there.
            labels: ``[N]``, integer, in ``0..K-1``, or −100 where a sample does not count, on that device. A class
                without samples becomes unfitted.

        Raises:
            ValueError: wrong rank, width, shape, device, label out of range, or features that are not finite.
            UsageError: ``fit="full"``, and scikit-learn refuses the features.
            TypeError: features not floating, or labels not integer.
        """
        with self.together(Batch(None, labels, features, features), refit=True) as whole:
            self._refit(whole)

    def _refit(self, batch: Batch) -> None:
        x, labels = self._checked(batch.features, batch.labels)
        as_labels(labels.cpu(), self.num_classes)  # their range too, on every device: a refit may wait
        inside = (labels >= 0) & (labels < self.num_classes)
        x, labels = x[inside], labels[inside]
        if len(x) > 0:
            low, high = (bound.item() for bound in torch.aminmax(x))  # NaN if there is one
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"features must be finite, got values from {low} to {high}")
        with torch.autocast(x.device.type, enabled=False):
            if self.fit == "full":
                self._refit_full(x, labels)
            else:
                self._refit_kmeans(x, labels)

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
            raise RuntimeError("information() needs a fitted mixture: call after_epoch() first")
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

    def _warn_without_a_fit(self) -> None:
        """Say once, and wait for the device once, that a training measures nothing."""
        if self._asked or not self.training or torch.compiler.is_compiling():
            return
        self._asked = True
        if not self.class_counts.any():
            warnings.warn(
                "GaussianMixtureCEM has no mixture yet, so its penalty is 0: after_epoch(features, labels) fits one to "
                "the training set's features, after every epoch",
                stacklevel=6,  # who called the surrogate
            )

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` in fp32 or wider, and labels, int64."""
        labels, _ = as_labels(labels, self.num_classes)
        rows = features.flatten(1)
        if rows.shape[1] != self.feature_dim:
            raise ValueError(f"a sample must have feature_dim={self.feature_dim} features, got {list(features.shape)}")
        return rows.to(torch.promote_types(features.dtype, torch.float32)), labels

    def extra_repr(self) -> str:
        return (
            f"{self.feature_dim}, num_classes={self.num_classes}, num_clusters={self.num_clusters}, "
            f"reg_strength={self.reg_strength:g}, fit={self.fit!r}"
        )


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
        try:
            mixture.fit(pca.fit_transform(rows))
        except ValueError as error:  # features of 1e10, of which a covariance loses its digits
            reason = str(error).partition(".")[0]
            raise UsageError(f"fit 'full' fails on a class of {len(rows)} samples ({reason}); take 'kmeans'") from error
    parts = (pca.mean_, pca.components_, mixture.means_, mixture.covariances_, mixture.weights_)
    mean, directions, means, covariances, weights = (torch.from_numpy(part) for part in parts)
    return mean, directions, means, covariances, weights
