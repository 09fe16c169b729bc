"""The attention surrogate: slots summarise each class, samples read them, and what still varies is penalised."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cem_kernels
from cem.surrogates.base import Surrogate
from cem.surrogates.threshold import coupled_threshold, warn_if_swamped
from cem_kernels import ClassGroups, CrossAttentionWeights, SlotAttentionWeights, backends, validation
from cem_kernels.class_variance import HINGES, Hinge
from cem_kernels.cross_attention import IMPLEMENTATIONS as CROSS_ATTENTION
from cem_kernels.slot_attention import IMPLEMENTATIONS as SLOT_ATTENTION

EVALUATION_SEED = 0


def _groups_of_rows(tokens: Tensor) -> ClassGroups:
    """Every row of the batch is a class of its own."""
    rows = tokens.shape[0]
    return ClassGroups.from_labels(torch.arange(rows, device=tokens.device), max(rows, 1), max_class_size=1)


def _two_layers(network: nn.Sequential) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of ``Linear, activation, Linear``."""
    first, _, last = network
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return first.weight, first.bias, last.weight, last.bias


class Normalised(torch.autograd.Function):
    """LayerNorm without an affine, which keeps its result and not its input: the result is kept by others anyway.

    ``x [..., D]`` to ``x̂ [..., D]`` and 1/deviation ``[..., 1]``, a result so that this is differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        normal, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
        ctx.save_for_backward(normal, rstd)
        ctx.set_materialize_grads(False)
        return normal, rstd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, d_rstd: Tensor | None) -> Tensor:
        normal, rstd = ctx.saved_tensors
        if upstream is not None and d_rstd is None and not torch.is_grad_enabled():
            # What is normalised already has mean 0 and deviation 1; PyTorch's kernel goes through it once.
            mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
            step: Tensor = torch.ops.aten.native_layer_norm_backward(
                upstream, normal, normal.shape[-1:], mean, one, None, None, [True, False, False]
            )[0]
            return step.mul_(rstd)
        upstream = torch.zeros_like(normal) if upstream is None else upstream
        along = (upstream * normal).mean(dim=-1, keepdim=True)
        if d_rstd is not None:
            along = along + d_rstd * rstd / normal.shape[-1]
        return rstd * (upstream - upstream.mean(dim=-1, keepdim=True) - normal * along)


class SlotAttention(nn.Module):
    """Slot attention over class groups, as a module.

    Args:
        num_slots: ``S``.
        slot_dim: ``D``, the width of tokens and slots.
        num_iterations: ``J``.
        eps: added to every attention weight.
        hidden_dim: width of the MLP, ``2D`` by default.
        backend: see :mod:`cem_kernels.backends`.

    Raises:
        ValueError: a size is not positive, or the backend is unknown.

    Source: Locatello et al. 2020. Parameter names are those of the original surrogate, so that its state dict loads.
    """

    eval_noise: Tensor

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        num_iterations: int = 3,
        eps: float = 1e-8,
        hidden_dim: int | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        hidden_dim = 2 * slot_dim if hidden_dim is None else hidden_dim
        validation.check_sizes(
            num_slots=num_slots, slot_dim=slot_dim, num_iterations=num_iterations, hidden_dim=hidden_dim
        )
        validation.check_positive(eps=eps)
        backends.check_available(backend, "slot_attention", SLOT_ATTENTION)
        self.num_slots, self.slot_dim, self.num_iterations = num_slots, slot_dim, num_iterations
        self.eps, self.backend = eps, backend
        self.slot_mu = nn.Parameter(torch.empty(1, 1, slot_dim))
        self.slot_log_sigma = nn.Parameter(torch.empty(1, 1, slot_dim))
        nn.init.xavier_uniform_(self.slot_mu)
        nn.init.xavier_uniform_(self.slot_log_sigma)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(slot_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))
        self.norm_inputs = nn.LayerNorm(slot_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        # Never zero: all slots share their mean, so without a draw they would stay identical for ever. Not part of
        # the state dict, because the original's has no such entry.
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.register_buffer("eval_noise", torch.randn(num_slots, slot_dim, generator=generator), persistent=False)

    def weights(self) -> SlotAttentionWeights:
        """The parameters in the order that the operator takes them."""
        return SlotAttentionWeights(
            self.to_q.weight, self.to_k.weight, self.to_v.weight,
            self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh,
            *_two_layers(self.mlp),
            self.norm_inputs.weight, self.norm_inputs.bias,
            self.norm_slots.weight, self.norm_slots.bias,
            self.norm_mlp.weight, self.norm_mlp.bias,
        )  # fmt: skip

    def initial_slots(self, num_classes: int, slot_noise: Tensor | None = None) -> Tensor:
        """``[K, S, D]``: ``μ + exp(log σ)·ε``.

        Args:
            num_classes: ``K``.
            slot_noise: the draw ``ε [K, S, D]``. By default a fresh one in training, and in evaluation one fixed
                draw, the same for every class and call.
        """
        shape = (num_classes, self.num_slots, self.slot_dim)
        if slot_noise is None:
            if self.training:
                slot_noise = torch.randn(shape, device=self.slot_mu.device, dtype=self.slot_mu.dtype)
            else:
                slot_noise = self.eval_noise.expand(shape)
        elif slot_noise.shape != shape:
            raise ValueError(f"slot_noise must have shape [K, S, D] = {list(shape)}, got {list(slot_noise.shape)}")
        return self.slot_mu + self.slot_log_sigma.exp() * slot_noise

    def forward(
        self,
        tokens: Tensor,
        groups: ClassGroups | None = None,
        slot_noise: Tensor | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Slots ``[K, S, D]`` of the tokens ``[B, T, D]``.

        Args:
            tokens: ``[B, T, D]``.
            groups: the classes of the ``B`` samples; by default every sample is a class of its own.
            slot_noise: see :meth:`initial_slots`.
            product_dtype: see :func:`cem_kernels.slot_attention`.
        """
        groups = _groups_of_rows(tokens) if groups is None else groups
        return cem_kernels.slot_attention(
            tokens,
            self.initial_slots(groups.num_classes, slot_noise),
            groups,
            self.weights(),
            num_iterations=self.num_iterations,
            eps=self.eps,
            product_dtype=product_dtype,
            backend=self.backend,
        )


class CrossAttention(nn.Module):
    """Gated cross attention from samples to their class's slots, as a module.

    Args:
        feature_dim: ``D``, the width of tokens and slots.
        num_heads: ``H``, a divisor of ``D``.
        dropout: probability of dropping an element of the attention's output, in training.
        ffn_mult: hidden width of the feed-forward network over ``D``.
        backend: see :mod:`cem_kernels.backends`.

    Raises:
        ValueError: ``feature_dim`` is no multiple of ``num_heads``, or the backend is unknown.

    Source: Alayrac et al. 2022 (Flamingo). Parameter names are those of the original surrogate.
    """

    def __init__(
        self,
        feature_dim: int,
        num_heads: int = 4,
        dropout: float = 0.0,
        ffn_mult: int = 4,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        validation.check_sizes(feature_dim=feature_dim, num_heads=num_heads, ffn_mult=ffn_mult)
        if feature_dim % num_heads:
            raise ValueError(f"feature_dim={feature_dim} must be a multiple of num_heads, got num_heads={num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        backends.check_available(backend, "cross_attention", CROSS_ATTENTION)
        self.feature_dim, self.num_heads, self.dropout, self.backend = (
            feature_dim,
            num_heads,
            dropout,
            backend,
        )
        self.ln_q = nn.LayerNorm(feature_dim)
        self.ln_kv = nn.LayerNorm(feature_dim)
        self.ln_ff = nn.LayerNorm(feature_dim)
        self.to_q = nn.Linear(feature_dim, feature_dim, bias=False)
        self.to_k = nn.Linear(feature_dim, feature_dim, bias=False)
        self.to_v = nn.Linear(feature_dim, feature_dim, bias=False)
        self.proj = nn.Linear(feature_dim, feature_dim)
        self.alpha_xattn = nn.Parameter(torch.tensor(0.1))
        self.alpha_ffn = nn.Parameter(torch.tensor(0.1))
        hidden = ffn_mult * feature_dim
        self.ffn = nn.Sequential(nn.Linear(feature_dim, hidden), nn.GELU(), nn.Linear(hidden, feature_dim))

    def weights(self) -> CrossAttentionWeights:
        """The parameters in the order that the operator takes them."""
        return CrossAttentionWeights(
            self.to_q.weight, self.to_k.weight, self.to_v.weight,
            self.proj.weight, self.proj.bias, self.alpha_xattn, self.alpha_ffn,
            *_two_layers(self.ffn),
            self.ln_q.weight, self.ln_q.bias,
            self.ln_kv.weight, self.ln_kv.bias,
            self.ln_ff.weight, self.ln_ff.bias,
        )  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        groups: ClassGroups | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Tokens ``[B, T, D]`` after reading the slots ``[K, S, D]`` of their classes.

        Args:
            tokens: ``[B, T, D]``.
            slots: ``[K, S, D]``.
            groups: the classes of the ``B`` samples; by default sample ``i`` reads ``slots[i]``, and then tokens
                ``[M, D]`` of a single class with slots ``[1, S, D]`` are accepted too.
            product_dtype: see :func:`cem_kernels.cross_attention`.
        """
        single = groups is None and tokens.dim() == 2
        tokens = tokens[None] if single else tokens
        groups = _groups_of_rows(tokens) if groups is None else groups
        out = cem_kernels.cross_attention(
            tokens,
            slots,
            groups,
            self.weights(),
            num_heads=self.num_heads,
            dropout=self.dropout if self.training else 0.0,
            product_dtype=product_dtype,
            backend=self.backend,
        )
        return out[0] if single else out


class SlotCrossAttentionCEM(Surrogate):
    """Conditional-entropy surrogate: attention per class, then class variance over a log threshold.

    Every sample's features are normalised, slot attention summarises each class's samples into slots, gated cross
    attention lets every sample read its class's slots, and the penalty is how far the log-variance of the result
    exceeds the threshold, inside each class. Small class variance against the noise at the cut bounds from below the
    error of every attacker who decodes the features.

    Example::

        cem_loss = cem.SlotCrossAttentionCEM(feature_dim=512, num_classes=10, reg_strength=0.1)
        rob_loss, intra_mse = cem_loss(features, labels)
        (cross_entropy + 16.0 * rob_loss).backward()

    Args:
        feature_dim: width of one sample's flattened features.
        num_slots: ``S``.
        num_heads: ``H``; divides the width that attention works in.
        num_iterations: ``J``.
        eps_var: floor of a variance; below it there is no gradient.
        var_threshold: ``τ``.
        reg_strength: ``σ``, the noise's standard deviation; the threshold is ``max(τσ², 1e-8)``.
        num_classes: ``K``; labels lie in ``[0, K)``. None reads the classes off the labels, which costs a host
            synchronisation a call.
        max_class_size: static bound on the samples of one class in a batch; spares eager its host synchronisation.
        min_samples: classes with fewer samples are left out.
        gamma: ``γ``, inside both logarithms.
        hinge: ``relu``, ``softplus`` or ``identity``.
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
        UserWarning: ``eps_var`` or ``gamma`` swamps the threshold (as they do at ``reg_strength=0``, the default).
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
        gamma: float = 1e-6,
        hinge: Hinge = "relu",
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
        if reduce not in ("linear", "conv1x1"):
            raise ValueError(f"reduce must be 'linear' or 'conv1x1', got {reduce!r}")
        if reduce == "conv1x1" and (reduce_dim is None or feature_shape is None):
            raise ValueError(
                "reduce='conv1x1' needs reduce_dim and feature_shape=(C, H, W), "
                f"got reduce_dim={reduce_dim} and feature_shape={feature_shape}"
            )
        if tokens not in ("flat", "spatial"):
            raise ValueError(f"tokens must be 'flat' or 'spatial', got {tokens!r}")
        if tokens == "spatial" and (feature_shape is None or (reduce_dim is not None and reduce == "linear")):
            raise ValueError(
                "tokens='spatial' needs feature_shape=(C, H, W), and reduces with reduce='conv1x1' if at all, "
                f"got feature_shape={feature_shape}, reduce_dim={reduce_dim} and reduce={reduce!r}"
            )
        validation.check_positive(eps_var=eps_var, gamma=gamma)
        if min_samples < 2:
            raise ValueError(f"min_samples must be at least 2, got {min_samples}: one sample has no variance")
        if hinge not in HINGES:
            raise ValueError(f"hinge must be one of {', '.join(HINGES)}, got {hinge!r}")
        self.feature_dim, self.feature_shape = feature_dim, feature_shape
        self.num_classes, self.max_class_size = num_classes, max_class_size
        self.eps_var, self.gamma, self.min_samples = eps_var, gamma, min_samples
        self.hinge: Hinge = hinge
        self.backend = backend
        self.threshold = coupled_threshold(var_threshold, reg_strength)
        warn_if_swamped(self.threshold, eps_var, gamma)

        self.num_tokens = 1  # T
        width = feature_dim
        if reduce_dim is not None and feature_shape is not None and reduce == "conv1x1":
            channels, height, breadth = feature_shape
            self.reduction: nn.Conv2d | nn.Linear = nn.Conv2d(channels, reduce_dim, kernel_size=1, bias=False)
            width = reduce_dim * height * breadth
        elif reduce_dim is not None:
            self.reduction = nn.Linear(feature_dim, reduce_dim, bias=False)
            width = reduce_dim
        if feature_shape is not None and tokens == "spatial":
            self.num_tokens = feature_shape[1] * feature_shape[2]
            width //= self.num_tokens
        self.slot_attention = SlotAttention(num_slots, width, num_iterations, backend=backend)
        self.cross_attention = CrossAttention(width, num_heads, dropout, backend=backend)

    def _flat(self, features: Tensor) -> Tensor:
        """``[B, D]`` or ``[B, C, H, W]`` to ``[B, width]`` in fp32 or wider, reduced where that was asked for.

        Neither under autocast nor in half precision: the spread inside a class that is left when training succeeds is
        lost in half precision's rounding. (Products may be in half precision: they add to the tokens through gates.)
        """
        validation.check_float("features", features)
        shape = self.feature_shape
        maps_fit = features.dim() == 4 and (shape is None or tuple(features.shape[1:]) == tuple(shape))
        if not (features.dim() == 2 or maps_fit) or math.prod(features.shape[1:]) != self.feature_dim:
            maps = "[B, C, H, W] with as many numbers" if shape is None else f"[B, {', '.join(map(str, shape))}]"
            raise ValueError(
                f"features must have shape [B, D={self.feature_dim}] or {maps}, got {list(features.shape)}"
            )
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        reduction: nn.Conv2d | nn.Linear | None = getattr(self, "reduction", None)
        if reduction is None:
            return features.flatten(1)
        validation.check_together(features, [("reduction.weight", reduction.weight)])
        weight = reduction.weight.to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            if shape is not None and isinstance(reduction, nn.Conv2d):
                return F.conv2d(features.reshape(-1, *shape), weight).flatten(1)
            return F.linear(features.flatten(1), weight)

    def _groups(self, labels: Tensor) -> ClassGroups:
        """The batch's classes; those of the labels themselves where ``num_classes`` is None."""
        num_classes = self.num_classes
        if num_classes is None:
            classes, labels = torch.unique(labels, return_inverse=True)
            num_classes = max(len(classes), 1)
        return ClassGroups.from_labels(labels, num_classes, max_class_size=self.max_class_size)

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
            unique_labels: classes to restrict to (one host synchronisation). The original passes
                ``torch.unique(labels)``, which is every class, and is the same as passing nothing.
            slot_noise: the slots' draw ``ε [K, S, D]``, for tests and reproductions.

        Returns:
            ``rob_loss`` and ``intra_mse``, 0-dim. Zero and attached to the graph where no class has ``min_samples``.

        Raises:
            TypeError, ValueError: see :meth:`cem_kernels.ClassGroups.from_labels` and the operators.
        """
        flat = self._flat(features)
        validation.check_labels(labels, self.num_classes)
        if labels.shape != flat.shape[:1]:
            raise ValueError(f"labels must have shape [B={len(flat)}], got {list(labels.shape)}")
        if unique_labels is not None:
            validation.check_labels(unique_labels, self.num_classes, "unique_labels")
            chosen = torch.isin(labels, unique_labels)
            flat, labels = flat[chosen], labels[chosen]
        groups = self._groups(labels)
        # A map's positions are its fastest index; a token is what the channels say at one of them.
        tokens, _ = Normalised.apply(flat.unflatten(1, (-1, self.num_tokens)).mT)  # [B, T, D]
        product_dtype = features.dtype if features.dtype in (torch.bfloat16, torch.float16) else None
        slots = self.slot_attention(tokens, groups, slot_noise, product_dtype)
        enhanced = self.cross_attention(tokens, slots, groups, product_dtype)
        result = cem_kernels.class_variance(
            enhanced,
            groups,
            threshold=self.threshold,
            eps_var=self.eps_var,
            gamma=self.gamma,
            min_samples=self.min_samples,
            hinge=self.hinge,
            backend=self.backend,
        )
        return result.rob_loss, result.intra_mse
