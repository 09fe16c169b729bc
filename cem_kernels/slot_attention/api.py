"""Slot attention over class groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cem_kernels import backends, validation
from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention import eager, reference
from cem_kernels.slot_attention.weights import SlotAttentionWeights


def slot_attention(
    tokens: Tensor,
    slots: Tensor,
    groups: ClassGroups,
    weights: SlotAttentionWeights,
    *,
    num_iterations: int = 3,
    eps: float = 1e-8,
    product_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Summarize the tokens of every class into that class's slots.

    Per class, with ``x`` its tokens and ``s`` its slots, ``num_iterations`` times::

        q = W_q LN_s(s) · D^-1/2      l = (W_k LN_x(x)) qᵀ / D^1/4      p = softmax over slots (l)
        a = (p + eps) / Σ_tokens (p + eps)      u = aᵀ (W_v LN_x(x))
        s ← GRU(u, s);  s ← s + MLP(LN_m(s))

    Args:
        tokens: ``[B, T, D]``, fp16, bf16, fp32 or fp64; any strides.
        slots: ``[K, S, D]``, where each class's slots start (``μ + exp(log σ)·ε``).
        groups: the batch's classes, ``B`` samples and ``K`` classes.
        weights: see :class:`SlotAttentionWeights`.
        num_iterations: ``J ≥ 1``.
        eps: added to every attention weight before it is normalized over tokens.
        product_dtype: fp32, bf16 or fp16, in which ``triton`` multiplies matrices; by default the dtype of the tokens.
            It sums in fp32, and fp32 follows :func:`torch.set_float32_matmul_precision`. The other backends compute in
            fp32 or wider, whatever the tokens are.
        backend: see :mod:`cem_kernels.backends`. ``triton`` takes ``D`` from 16 to 512, ``S`` to 32, fp32, bf16 and
            fp16; it is differentiable once, the others twice.

    Returns:
        ``[K, S, D]`` in fp32 (fp64 for fp64 tokens). A class without samples keeps the slots it started with. Same
        bits for the same call on the same model of device; differentiable in tokens, slots and weights.

    Raises:
        TypeError: a dtype is not floating-point, fp64 is mixed with narrower ones, or ``product_dtype`` is another.
        ValueError: shapes or devices do not fit, ``num_iterations`` or ``eps`` is not positive, unknown backend.
        BackendUnavailableError: the backend asked for by name cannot run this call.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention".
    """
    backends.check_backend(backend)
    validation.check_float("tokens", tokens)
    validation.check_product_dtype(product_dtype)
    validation.check_shape("tokens", tokens, {"B": groups.num_samples, "T": None, "D": None})
    width = tokens.shape[2]
    validation.check_float("slots", slots)
    validation.check_shape("slots", slots, {"K": groups.num_classes, "S": None, "D": width})
    validation.check_weights(tokens, weights, weights.expected_shapes())
    validation.check_together(tokens, [("slots", slots), ("groups", groups.order)])
    validation.check_sizes(num_iterations=num_iterations)
    validation.check_positive(eps=eps)

    objection = backends.size_outside_kernels(tokens, slots)
    chosen = backends.pick(backend, "slot_attention", tokens, objection)
    # The others have one dtype for everything.
    options = {"product_dtype": product_dtype} if chosen == "triton" else {}
    implementation: Any = reference if chosen == "reference" else eager
    if chosen == "triton":
        from cem_kernels.slot_attention import triton  # only here, because importing needs Triton

        implementation = triton
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        wide = SlotAttentionWeights(*(weight.to(dtype) for weight in weights))
        result: Tensor = implementation.slot_attention(
            tokens, slots.to(dtype), groups, wide, num_iterations, eps, **options
        )
    return result
