"""The attention surrogate: slots summarize each class, samples read them, and what still varies is penalized."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cem_kernels
from cem.surrogates.anchor import Anchors
from cem.surrogates.bank import MemoryBank
from cem.surrogates.base import Surrogate
from cem.surrogates.modules import CrossAttention, Normalized, SlotAttention
from cem.surrogates.threshold import (
    REMEDY,
    REMEDY_OF_FIXED,
    Policy,
    Threshold,
    coupled_threshold,
    warn_if_swamped,
)
from cem_kernels import ClassGroups, ClassVariance, backends, validation
from cem_kernels.class_variance import HINGES, Hinge
from cem_kernels.class_variance import IMPLEMENTATIONS as CLASS_VARIANCE
from cem_kernels.slot_variance import IMPLEMENTATIONS as SLOT_VARIANCE

Measure = Literal["enhanced", "slots"]
Penalty = Literal["hinge", "entropy"]
Objective = Literal["penalty", "likelihood", "reconstruction"]
NAMES: dict[str, tuple[str, ...]] = {
    "measure": get_args(Measure),
    "penalty": get_args(Penalty),
    "objective": get_args(Objective),
    "hinge": HINGES,
    "reduce": ("linear", "conv1x1"),
    "tokens": ("flat", "spatial"),
}
GAMMA = 1e-6
NEXT_TO_NOTHING = 1e-30  # a variance whose logarithm is finite


class SlotCrossAttentionCEM(Surrogate):
    """Conditional-entropy surrogate: attention per class, then class variance over a log threshold.

    Every sample's features are normalized, slot attention summarizes each class's samples into slots, gated cross
    attention lets every sample read its class's slots, and the penalty is how far the log-variance of the result
    exceeds the threshold, inside each class. Small class variance against the noise at the cut bounds from below the
    error of every attacker who decodes the features.

    That is ``measure="enhanced"``, the original. It is taken of normalized features, so that it does not know how large
    they are against the noise. ``measure="slots"`` does: slots say, without a gradient, which samples of a class belong
    together, and what is penalized is how far the features as they are sent lie from the centroids of these slots.
    Slots say little before they are trained (``objective``): then this is nearly the variance of the class. With
    ``num_slots=1`` it is exactly that: no slot is computed, and there are no parameters.

    Example::

        cem_loss = cem.SlotCrossAttentionCEM(feature_dim=512, num_classes=10, reg_strength=0.1)
        rob_loss, intra_mse = cem_loss(features, labels)
        (cross_entropy + 16.0 * rob_loss).backward()

    Args:
        feature_dim: width of one sample's flattened features.
        num_slots: ``S``.
        num_heads: ``H``; divides the width that attention works in.
        num_iterations: ``J``.
        eps_var: of ``penalty="hinge"``: floor of a variance; below it there is no gradient.
        var_threshold: ``τ``, of ``penalty="hinge"``.
        reg_strength: ``σ``, the noise's standard deviation; the threshold is ``max(τσ², 1e-8)``.
        num_classes: ``K``; labels lie in ``[0, K)``. None reads the classes off the labels, which costs a host
            synchronization a call.
        max_class_size: static bound on the samples of one class in a batch; spares eager its host synchronization.
        min_samples: classes with fewer samples are left out; with ``anchor`` in evaluation only, as a single sample has
            a distance to its class's running centroid.
        gamma: ``γ``, inside both logarithms of ``penalty="hinge"``; None is 1e-6. Where a variance is well below ``γ``,
            its penalty is nearly linear in it.
        hinge: of ``penalty="hinge"``: ``relu``, ``softplus`` or ``identity``.
        measure: of which variance, ``enhanced`` or ``slots``.
        penalty: ``hinge``, how far the log-variance exceeds the threshold; or ``entropy``, what a Gaussian of this
            variance tells through the noise, ``½ log(1 + v/σ²)`` nats a column: Eq. 7 of arXiv:2503.00383v2 but for the
            terms without a gradient. It has no threshold, and needs ``reg_strength``. Nats of the noise they are with
            ``measure="slots"`` only: ``enhanced`` measures normalized features, which the noise is not added to.
        threshold: how the threshold moves, see :class:`~cem.surrogates.threshold.Threshold`.
        threshold_value: where ``fixed`` stands and ``ramp`` begins.
        threshold_quantile: of ``quantile``.
        objective: what its own parameters are trained on, by whoever trains them (:meth:`own_loss`). ``penalty``:
            ``rob_loss``, which they can lower without any change of the features. ``likelihood``: slots as the centers
            of a mixture. ``reconstruction``: samples from the slots that they belong to.
        anchor: measure, in training, around running centroids of classes of this momentum, such as 0.99, instead of a
            batch's own: features that all shrink are no way out then, see :class:`~cem.surrogates.anchor.Anchors`. For
            ``measure="slots"`` with ``num_slots=1``; 0 for none. Needs ``num_classes``.
        memory_bank: remember so many recent features of every class, in training, and measure the variance of a batch
            together with them, for many classes and small batches; 0 for none. Needs ``num_classes``. Gradients are as
            large as without it; what is remembered was sent by an older encoder.
        dropout: on the attention's output, in training.
        reduce_dim: work on a projection of the features, because flat features of width ``D`` need ``D × D``
            matrices. With ``reduce="linear"`` the width it projects to; with ``reduce="conv1x1"`` the channels.
        reduce: ``linear``, a linear map of the flattened features, or ``conv1x1``, a 1×1 convolution before flattening.
            Neither has a bias: a constant does not change a variance.
        feature_shape: ``(C, H, W)`` of one sample's features; needed by ``conv1x1`` and by spatial tokens.
        tokens: ``flat``, one token a sample, or ``spatial``: every position of a map is a token as wide as the map has
            channels (after ``conv1x1``), and variances are those of a channel at a position, over the class's samples.
        backend: see :mod:`cem_kernels.backends`.

    Raises:
        ValueError: sizes do not fit together, a number is out of range, or a name is unknown.
        BackendUnavailableError: an operator does not have the backend that is asked for by name.

    Warns:
        UserWarning: with ``penalty="hinge"``, ``eps_var``, or the ``gamma`` that nobody chose, swamps the threshold (as
            they do at ``reg_strength=0``, the default).
    """

    def __init__(
        self,
        feature_dim: int,
        num_slots: int = 8,
        num_heads: int = 4,
        num_iterations: int = 3,
        eps_var: float = 1e-4,
        var_threshold: float = 0.1,
        reg_strength: float = 0.0,
        *,
        num_classes: int | None = None,
        max_class_size: int | None = None,
        min_samples: int = 2,
        gamma: float | None = None,
        hinge: Hinge = "relu",
        measure: Measure = "enhanced",
        penalty: Penalty = "hinge",
        threshold: Policy = "coupled",
        threshold_value: float = 0.05,
        threshold_quantile: float = 0.5,
        objective: Objective = "penalty",
        anchor: float = 0.0,
        memory_bank: int = 0,
        dropout: float = 0.0,
        reduce_dim: int | None = None,
        reduce: Literal["linear", "conv1x1"] = "linear",
        feature_shape: tuple[int, int, int] | None = None,
        tokens: Literal["flat", "spatial"] = "flat",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        validation.check_sizes(
            feature_dim=feature_dim, num_classes=num_classes, max_class_size=max_class_size, reduce_dim=reduce_dim
        )
        if feature_shape is not None and (len(feature_shape) != 3 or math.prod(feature_shape) != feature_dim):
            raise ValueError(
                f"feature_shape must be (C, H, W) with C*H*W = feature_dim = {feature_dim}, got {tuple(feature_shape)}"
            )
        chosen = {"measure": measure, "penalty": penalty, "objective": objective, "hinge": hinge}
        for name, value in {**chosen, "reduce": reduce, "tokens": tokens}.items():
            if value not in NAMES[name]:
                raise ValueError(f"{name} must be one of {', '.join(NAMES[name])}, got {value!r}")
        if reduce == "conv1x1" and (reduce_dim is None or feature_shape is None):
            raise ValueError(
                "reduce='conv1x1' needs reduce_dim and feature_shape=(C, H, W), "
                f"got reduce_dim={reduce_dim} and feature_shape={feature_shape}"
            )
        if tokens == "spatial" and (feature_shape is None or (reduce_dim is not None and reduce == "linear")):
            raise ValueError(
                "tokens='spatial' needs feature_shape=(C, H, W), and reduces with reduce='conv1x1' if at all, "
                f"got feature_shape={feature_shape}, reduce_dim={reduce_dim} and reduce={reduce!r}"
            )
        chosen_gamma, gamma = gamma is not None, GAMMA if gamma is None else gamma
        validation.check_positive(eps_var=eps_var, gamma=gamma)
        if min_samples < 2:
            raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
        if penalty != "hinge" and (reg_strength <= 0 or threshold != "coupled" or hinge != "relu"):
            raise ValueError(
                f"penalty={penalty!r} needs reg_strength above 0, and has neither a threshold nor a hinge: with them "
                f"give penalty='hinge'; got reg_strength={reg_strength}, threshold={threshold!r} and hinge={hinge!r}"
            )
        if memory_bank < 0 or (memory_bank and num_classes is None):
            raise ValueError(
                f"memory_bank must be at least 0, and needs num_classes, got {memory_bank} and {num_classes}"
            )
        if anchor and (measure != "slots" or num_slots != 1 or memory_bank):
            raise ValueError(
                "anchor needs measure='slots' and num_slots=1, and no memory_bank: with others give anchor=0; "
                f"got {anchor=}, measure={measure!r}, num_slots={num_slots}, memory_bank={memory_bank}"
            )
        if anchor and num_classes is None:
            raise ValueError("anchor needs num_classes")
        if measure == "slots" and threshold == "quantile":
            raise ValueError(
                "threshold='quantile' follows the variances of classes, which measure='slots' does not have; give "
                "measure='enhanced'"
            )
        attends = measure == "enhanced" or num_slots != 1
        if not attends and (objective != "penalty" or reduce_dim is not None):
            raise ValueError(
                "measure='slots' with num_slots=1 computes no slots: nothing is reduced, and nothing has an objective, "
                f"got reduce_dim={reduce_dim} and objective={objective!r}"
            )
        if measure == "slots":
            operator, available = ("slot_variance", SLOT_VARIANCE) if attends else ("class_variance", CLASS_VARIANCE)
            backends.check_available(backend, operator, available)
        self.feature_dim, self.feature_shape = feature_dim, feature_shape
        self.num_classes, self.max_class_size = num_classes, max_class_size
        self.eps_var, self.gamma, self.min_samples = eps_var, gamma, min_samples
        self.hinge: Hinge = hinge
        self.measure, self.penalty, self.objective, self.backend = measure, penalty, objective, backend
        self.reg_strength = reg_strength
        self.threshold = Threshold(
            threshold, coupled_threshold(var_threshold, reg_strength), threshold_value, threshold_quantile
        )
        if penalty == "hinge":
            remedy = REMEDY_OF_FIXED if threshold == "fixed" else REMEDY
            warn_if_swamped(self.threshold.lowest, eps_var, 0.0 if chosen_gamma else gamma, remedy)

        self.num_tokens = 1  # T
        width = feature_dim
        self.reduction: nn.Conv2d | nn.Linear | None = None
        if reduce_dim is not None and feature_shape is not None and reduce == "conv1x1":
            channels, height, breadth = feature_shape
            self.reduction = nn.Conv2d(channels, reduce_dim, kernel_size=1, bias=False)
            width = reduce_dim * height * breadth
        elif reduce_dim is not None:
            self.reduction = nn.Linear(feature_dim, reduce_dim, bias=False)
            width = reduce_dim
        if feature_shape is not None and tokens == "spatial":
            self.num_tokens = feature_shape[1] * feature_shape[2]
            width //= self.num_tokens
        self.slot_attention = SlotAttention(num_slots, width, num_iterations, backend=backend) if attends else None
        if measure == "enhanced":
            self.cross_attention = CrossAttention(width, num_heads, dropout, backend=backend)
        self.anchors = Anchors(num_classes, feature_dim, anchor) if anchor and num_classes else None
        self.bank = MemoryBank(num_classes, memory_bank, feature_dim) if memory_bank and num_classes else None

    def _rows(self, features: Tensor) -> Tensor:
        """``[B, D]`` or ``[B, C, H, W]`` to ``[B, D]`` in fp32 or wider.

        Not in half precision: the spread inside a class that is left when training succeeds is lost in its rounding.
        (Products may be in half precision: they add to the tokens through gates.)
        """
        validation.check_float("features", features)
        shape = self.feature_shape
        maps_fit = features.dim() == 4 and (shape is None or tuple(features.shape[1:]) == tuple(shape))
        if not (features.dim() == 2 or maps_fit) or math.prod(features.shape[1:]) != self.feature_dim:
            maps = "[B, C, H, W] with as many numbers" if shape is None else f"[B, {', '.join(map(str, shape))}]"
            raise ValueError(
                f"features must have shape [B, D={self.feature_dim}] or {maps}, got {list(features.shape)}"
            )
        if self.reduction is not None:
            validation.check_together(features, [("reduction.weight", self.reduction.weight)])
        return features.to(torch.promote_types(features.dtype, torch.float32)).flatten(1)

    def _reduced(self, rows: Tensor) -> Tensor:
        """``[B, D]`` to ``[B, T, width]``: reduced where that was asked for; and cut into tokens."""
        if self.reduction is not None:
            weight = self.reduction.weight.to(rows.dtype)
            with torch.autocast(rows.device.type, enabled=False):
                if self.feature_shape is not None and isinstance(self.reduction, nn.Conv2d):
                    rows = F.conv2d(rows.reshape(-1, *self.feature_shape), weight).flatten(1)
                else:
                    rows = F.linear(rows, weight)
        return self._tokens(rows)

    def _classes(self, labels: Tensor) -> tuple[Tensor, int]:
        """Labels and the number of classes; those of the labels themselves where ``num_classes`` is None."""
        if self.num_classes is not None:
            return labels, self.num_classes
        classes, labels = torch.unique(labels, return_inverse=True)
        return labels, max(len(classes), 1)

    def _tokens(self, rows: Tensor) -> Tensor:
        """``[B, width]`` to ``[B, T, D]``. A map's positions are its fastest index; a token is its channels at one."""
        return rows.unflatten(1, (-1, self.num_tokens)).mT

    def begin_epoch(self, progress: float) -> None:
        """See :class:`Surrogate`."""
        self.threshold.begin_epoch(progress)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        unique_labels: Tensor | None = None,
        *,
        slot_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The penalty and its monitor.

        Args:
            features: ``[B, D]`` or ``[B, C, H, W]``, clean, on the encoder's graph. Of half-precision features the
                kernels multiply matrices in that dtype; all else is in fp32, and so are the losses.
            labels: ``[B]`` integer classes.
            unique_labels: classes to restrict to (one host synchronization). The original passes
                ``torch.unique(labels)``, which is every class, and is the same as passing nothing.
            slot_noise: the slots' draw ``ε [K, S, D]``, for tests and reproductions.

        Returns:
            ``rob_loss`` and ``intra_mse``, 0-dim. Zero and attached to the graph where no class has ``min_samples``
            (with ``anchor``, in training: where there is no sample).

        Raises:
            TypeError, ValueError: see :meth:`cem_kernels.ClassGroups.from_labels` and the operators.
        """
        brought = self._rows(features)
        validation.check_labels(labels, self.num_classes)
        if labels.shape != brought.shape[:1]:
            raise ValueError(f"labels must have shape [B={len(brought)}], got {list(labels.shape)}")
        if unique_labels is not None:
            validation.check_labels(unique_labels, self.num_classes, "unique_labels")
            chosen = torch.isin(labels, unique_labels)
            brought, labels = brought[chosen], labels[chosen]
        rows, (classes, num_classes), bound = brought, self._classes(labels), self.max_class_size
        remembering = self.bank if self.training else None
        if remembering is not None:
            rows, classes = remembering.extend(self._for_all(brought, labels), labels)
            num_classes *= 2  # behind the classes, what is not remembered yet
            bound = None if bound is None else bound + remembering.size
            if slot_noise is not None and self.slot_attention is not None:
                self.slot_attention.check_noise(slot_noise, num_classes // 2)
                slot_noise = slot_noise.repeat(2, 1, 1)
        groups = ClassGroups.from_labels(classes, num_classes, max_class_size=bound)
        product_dtype = features.dtype if features.dtype in (torch.bfloat16, torch.float16) else None
        measured = self._enhanced if self.measure == "enhanced" else self._around_slots
        result = measured(rows, groups, slot_noise, product_dtype)
        rob_loss, intra_mse = result.rob_loss, result.intra_mse
        if remembering is not None:
            rob_loss, intra_mse = self._of_batch(result, labels, groups)
            remembering.remember(brought, labels)
        # Half a logarithm of a ratio of variances is one of deviations: nats.
        return rob_loss / 2 if self.penalty == "entropy" else rob_loss, intra_mse

    def _enhanced(
        self, rows: Tensor, groups: ClassGroups, slot_noise: Tensor | None, product_dtype: torch.dtype | None
    ) -> ClassVariance:
        """Of what samples are, normalized, after reading the slots of their class."""
        tokens, _ = Normalized.apply(self._reduced(rows))
        assert self.slot_attention is not None
        slots = self.slot_attention(tokens, groups, slot_noise, product_dtype)
        enhanced = self.cross_attention(tokens, slots, groups, product_dtype)
        return cem_kernels.class_variance(enhanced, groups, **self._penalized(enhanced, groups), backend=self.backend)

    def _around_slots(
        self, rows: Tensor, groups: ClassGroups, slot_noise: Tensor | None, product_dtype: torch.dtype | None
    ) -> ClassVariance:
        """Of features as they are, around the centroids of the slots that they belong to.

        Slots may be of a projection. The variance is not: the noise of a projection is not ``σ``.
        """
        tokens = self._tokens(rows)
        options = {**self._penalized(tokens, groups), "backend": self.backend}
        if self.anchors is not None and self.training:
            del options["min_samples"]  # a single sample has a distance to its centroid
            return self.anchors(rows, groups, **options)
        if self.slot_attention is None:  # to a single slot everything belongs, whatever it is
            return cem_kernels.class_variance(tokens, groups, **options)
        with torch.no_grad():
            normal, _ = Normalized.apply(self._reduced(rows))
            slots = self.slot_attention(normal, groups, slot_noise, product_dtype)
            attention = cem_kernels.slot_assignments(normal, slots, groups, self.slot_attention.weights())
        return cem_kernels.slot_variance(tokens, attention, groups, **options)

    def _penalized(self, features: Tensor, groups: ClassGroups) -> dict[str, Any]:
        """How variances become a penalty: options of the operators."""
        if self.penalty == "entropy":
            nothing = {"threshold": NEXT_TO_NOTHING, "eps_var": NEXT_TO_NOTHING}
            return {**nothing, "gamma": self.reg_strength**2, "min_samples": self.min_samples, "hinge": "identity"}
        if self.training:
            # A memory's places that are not filled yet are classes behind these.
            self.threshold.observe(features, groups, self.min_samples, self.num_classes or groups.num_classes)
        numbers = {"eps_var": self.eps_var, "gamma": self.gamma, "min_samples": self.min_samples}
        return {"threshold": self.threshold(), **numbers, "hinge": self.hinge}

    def _for_all(self, brought: Tensor, labels: Tensor) -> Tensor:
        """``brought`` with gradients as large as if those of what is remembered were the batch's too.

        A class of 3 samples and 60 remembered ones passes on 3/63 of its gradient otherwise: as much less as there is
        in the memory.
        """
        assert self.bank is not None
        remembered = self.bank.written.clamp(max=self.bank.size)
        counts = ClassGroups.from_labels(labels, len(remembered)).counts
        factor = (1 + remembered / counts.clamp(min=1))[labels].to(brought.dtype)[:, None]
        rows = brought.view_as(brought)
        if rows.requires_grad:
            rows.register_hook(lambda gradient: factor * gradient)
        return rows

    def _of_batch(self, result: ClassVariance, labels: Tensor, groups: ClassGroups) -> tuple[Tensor, Tensor]:
        """The losses over the classes of the batch, weighted by its samples alone: the others do not change."""
        counts = ClassGroups.from_labels(labels, self.num_classes or 1).counts
        counts = torch.where(groups.counts[: len(counts)] >= self.min_samples, counts, 0).to(result.class_mse.dtype)
        share = counts / counts.sum().clamp(min=1)
        return (share * result.class_penalty[: len(share)]).sum(), (share * result.class_mse[: len(share)]).sum()

    def own_loss(self, features: Tensor, labels: Tensor) -> Tensor | None:
        """See :class:`Surrogate`. Both losses are means over samples, tokens and columns, of normalized features.

        ``likelihood``: ``−log Σ_s N(x; slot_s, 1) / S`` a column, without its constant; ``reconstruction``:
        ``(x − Σ_s p_s slot_s)²``. Classes of fewer than ``min_samples`` are left out here too. A reduction gets no
        gradient: it could make all samples alike.
        """
        if self.objective == "penalty":
            return None
        assert self.slot_attention is not None  # the constructor sees to that
        rows = self._rows(features).detach()
        validation.check_labels(labels, self.num_classes)
        validation.check_shape("labels", labels, {"B": len(rows)})
        classes, num_classes = self._classes(labels)
        groups = ClassGroups.from_labels(classes, num_classes, max_class_size=self.max_class_size)
        counted = (groups.counts >= self.min_samples)[groups.labels]
        rows = torch.where(counted[:, None], rows, 0)
        tokens, _ = Normalized.apply(self._reduced(rows).detach())
        slots = self.slot_attention(tokens, groups)
        own = slots.index_select(0, groups.labels)[:, None]  # [B, 1, S, D]
        if self.objective == "reconstruction":
            attention = cem_kernels.slot_assignments(tokens, slots, groups, self.slot_attention.weights())
            loss = (tokens - (attention[..., None] * own).sum(dim=2)).square().mean(dim=(1, 2))
        else:
            distance = (tokens[:, :, None] - own).square().sum(dim=3)
            likelihood = torch.logsumexp(-distance / 2, dim=2) - math.log(slots.shape[1])
            loss = -likelihood.mean(dim=1) / tokens.shape[2]
        return torch.where(counted, loss, 0).sum() / counted.sum().clamp(min=1)
