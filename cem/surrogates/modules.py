"""Slot attention and cross attention as modules, with the parameter names of the original surrogate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cem_kernels import ClassGroups, CrossAttentionWeights, SlotAttentionWeights, backends, validation
from cem_kernels.cross_attention import cross_attention
from cem_kernels.slot_attention import slot_attention

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


class Normalized(torch.autograd.Function):
    """LayerNorm without an affine, which keeps its result and not its input: the result is kept by others anyway.

    ``x [..., D]`` to ``x̂ [..., D]`` and 1/deviation ``[..., 1]``, a result so that this is differentiable twice.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        normal, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
        return normal, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, d_rstd: Tensor | None) -> Tensor:
        normal, rstd = ctx.saved_tensors
        if upstream is not None and d_rstd is None and not torch.is_grad_enabled():
            # What is normalized already has mean 0 and deviation 1; PyTorch's kernel goes through it once.
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
        backends.check_available(backend, "slot_attention")
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
        self.check_noise(slot_noise, num_classes)
        return self.slot_mu + self.slot_log_sigma.exp() * slot_noise

    def check_noise(self, slot_noise: Tensor, num_classes: int) -> None:
        """Raise ValueError where a draw for so many classes does not have its shape."""
        shape = [num_classes, self.num_slots, self.slot_dim]
        if list(slot_noise.shape) != shape:
            raise ValueError(f"slot_noise must have shape [K, S, D] = {shape}, got {list(slot_noise.shape)}")

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
            product_dtype: see :func:`cem_kernels.slot_attention.slot_attention`.
        """
        groups = _groups_of_rows(tokens) if groups is None else groups
        slots = self.initial_slots(groups.num_classes, slot_noise)
        return slot_attention(
            tokens, slots, groups, self.weights(), num_iterations=self.num_iterations, eps=self.eps,
            product_dtype=product_dtype, backend=self.backend,
        )  # fmt: skip


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
        self, feature_dim: int, num_heads: int = 4, dropout: float = 0.0, ffn_mult: int = 4, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        validation.check_sizes(feature_dim=feature_dim, num_heads=num_heads, ffn_mult=ffn_mult)
        if feature_dim % num_heads:
            raise ValueError(f"feature_dim={feature_dim} must be a multiple of num_heads, got num_heads={num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        backends.check_available(backend, "cross_attention")
        self.feature_dim, self.num_heads, self.dropout, self.backend = (feature_dim, num_heads, dropout, backend)
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
        self, tokens: Tensor, slots: Tensor, groups: ClassGroups | None = None, product_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tokens ``[B, T, D]`` after reading the slots ``[K, S, D]`` of their classes.

        Args:
            tokens: ``[B, T, D]``.
            slots: ``[K, S, D]``.
            groups: the classes of the ``B`` samples; by default sample ``i`` reads ``slots[i]``, and then tokens
                ``[M, D]`` of a single class with slots ``[1, S, D]`` are accepted too.
            product_dtype: see :func:`cem_kernels.cross_attention.cross_attention`.
        """
        single = groups is None and tokens.dim() == 2
        tokens = tokens[None] if single else tokens
        groups = _groups_of_rows(tokens) if groups is None else groups
        dropout = self.dropout if self.training else 0.0
        out = cross_attention(
            tokens, slots, groups, self.weights(), num_heads=self.num_heads, dropout=dropout,
            product_dtype=product_dtype, backend=self.backend,
        )  # fmt: skip
        return out[0] if single else out
