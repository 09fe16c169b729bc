"""Gated cross attention from samples to their class's slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.cross_attention import eager, reference
from cem_kernels.cross_attention.weights import CrossAttentionWeights
from cem_kernels.groups import ClassGroups


def cross_attention(
    tokens: Tensor,
    slots: Tensor,
    groups: ClassGroups,
    weights: CrossAttentionWeights,
    *,
    num_heads: int = 4,
    dropout: float = 0.0,
    product_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Let every token read its class's slots, through two gates that start almost shut.

    With ``x`` a token and ``s`` the slots of its class::

        q = W_q LN_q(x)   k = W_k LN_kv(s)   v = W_v LN_kv(s)      o = per head: softmax over slots (q kᵀ · d^-1/2) v
        y = x + tanh(α_x) · drop(W_p o + b_p)          out = y + tanh(α_f) · FFN(LN_f(y))       FFN: D → 4D → D, GELU

    Args:
        tokens: ``[B, T, D]``, fp16, bf16, fp32 or fp64; any strides.
        slots: ``[K, S, D]``.
        groups: the batch's classes, ``B`` samples and ``K`` classes.
        weights: see :class:`CrossAttentionWeights`.
        num_heads: ``H``; ``D`` must be a multiple of it.
        dropout: probability in ``[0, 1)`` that an element of ``W_p o + b_p`` is dropped (and the rest scaled up). Pass
            0 when evaluating. Drawn from PyTorch's global generator, in batch order.
        product_dtype: fp32, bf16 or fp16, in which ``triton`` multiplies matrices; by default the dtype of the tokens.
            It sums in fp32, and fp32 follows :func:`torch.set_float32_matmul_precision`. The other backends compute in
            fp32 or wider, whatever the tokens are.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes ``D`` from 16 to 512, ``S`` to 32, ``H`` to 16, fp32,
            bf16 and fp16; it is differentiable once, the others twice.

    Returns:
        ``[B, T, D]`` in fp32 (fp64 for fp64 tokens), in batch order. Differentiable in tokens, slots and weights.

    Raises:
        TypeError: a dtype is not floating-point, fp64 is mixed with narrower ones, or ``product_dtype`` is another.
        ValueError: shapes or devices do not fit, ``D`` is no multiple of ``num_heads``, ``dropout`` out of range.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", section 2.2.
    """
    backends.check_backend(backend)
    validation.check_float("tokens", tokens)
    validation.check_product_dtype(product_dtype)
    validation.check_shape("tokens", tokens, {"B": groups.num_samples, "T": None, "D": None})
    width = tokens.shape[2]
    validation.check_shape("slots", slots, {"K": groups.num_classes, "S": None, "D": width})
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"the token width D={width} must be a multiple of num_heads, got num_heads={num_heads}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    validation.check_weights(tokens, weights, weights.expected_shapes())
    validation.check_together(tokens, [("slots", slots), ("groups", groups.order)])

    objection = backends.size_outside_kernels(tokens, slots, ("H", num_heads, 1, 16))
    chosen = backends.pick(backend, "cross_attention", tokens, objection)
    # The others have one dtype for everything.
    options = {"product_dtype": product_dtype} if chosen == "triton" else {}
    implementation: Any = reference if chosen == "reference" else eager
    if chosen == "triton":
        from cem_kernels.cross_attention import triton  # only here, because importing needs Triton

        implementation = triton
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        wide = CrossAttentionWeights(*(weight.to(dtype) for weight in weights))
        result: Tensor = implementation.cross_attention(
            tokens, slots.to(dtype), groups, wide, num_heads, dropout, **options
        )
    return result
