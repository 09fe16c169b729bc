"""The gated feed-forward network behind cross attention: two library matrix products in every fast backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.cross_attention.weights import CrossAttentionWeights

LN_EPS = 1e-5  # F.layer_norm's
CHUNK = 2**12  # tokens whose hidden layers are in memory at a time: small enough for the L2 cache

Network = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def feed_forward(y: Tensor, weights: CrossAttentionWeights, product_dtype: torch.dtype) -> Tensor:
    """``y + tanh(α_f) · FFN(LN_f(y))`` in the dtype of ``y [B, T, D]``.

    Args:
        y: after the read, fp32 or fp64.
        weights: the block's weights, in the dtype of ``y``.
        product_dtype: dtype of the operands of both matrix products; they accumulate in fp32 (fp64 for fp64).
    """
    w = weights
    hidden = F.layer_norm(y, y.shape[-1:], w.ln_ff_weight, w.ln_ff_bias).to(product_dtype)
    hidden = F.gelu(F.linear(hidden, w.ffn_in_weight.to(product_dtype), w.ffn_in_bias.to(product_dtype)))
    out = F.linear(hidden, w.ffn_out_weight.to(product_dtype), w.ffn_out_bias.to(product_dtype))
    return y + torch.tanh(w.alpha_ffn) * out.to(y.dtype)


def network(weights: CrossAttentionWeights) -> Network:
    """The weights that :func:`feed_forward` uses, in the order of :func:`feed_forward_backward`'s results."""
    w = weights
    norm = w.ln_ff_weight, w.ln_ff_bias
    return w.alpha_ffn, w.ffn_in_weight, w.ffn_in_bias, w.ffn_out_weight, w.ffn_out_bias, *norm


def feed_forward_in_chunks(y: Tensor, net: Network, product_dtype: torch.dtype) -> Tensor:
    """:func:`feed_forward` of ``y [N, D]``, never with more than ``CHUNK`` hidden layers in memory; no autograd."""
    alpha, in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias = net
    result, gate = torch.empty_like(y), torch.tanh(alpha)
    in_weight, in_bias, out_weight, out_bias = (
        weight.to(product_dtype) for weight in (in_weight, in_bias, out_weight, out_bias)
    )
    for rows, out in zip(y.split(CHUNK), result.split(CHUNK), strict=True):
        hidden = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, LN_EPS).to(product_dtype)
        hidden = F.gelu(F.linear(hidden, in_weight, in_bias))
        torch.addcmul(rows, gate, F.linear(hidden, out_weight, out_bias).to(y.dtype), out=out)
    return result


def feed_forward_backward(
    y: Tensor, upstream: Tensor, net: Network, product_dtype: torch.dtype, *, frozen: bool
) -> tuple[Tensor, ...]:
    """Gradients of ``y [N, D]`` and, unless ``frozen``, of the network from :func:`feed_forward`'s input alone.

    Chunk by chunk the hidden layer is computed again: one more matrix product, and nothing ``4D`` wide is kept from the
    forward. Sums over chunks are in the dtype of ``y``.
    """
    alpha, in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias = net
    gate, dy, width = torch.tanh(alpha), torch.empty_like(y), y.shape[-1:]
    wide_in, wide_out = in_weight.to(product_dtype), out_weight.to(product_dtype)
    sums = [] if frozen else [torch.zeros_like(weight) for weight in net[1:]]
    for rows, above, below in zip(y.split(CHUNK), upstream.split(CHUNK), dy.split(CHUNK), strict=True):
        normal, mean, rstd = torch.native_layer_norm(rows, width, norm_weight, norm_bias, LN_EPS)
        normal, low = normal.to(product_dtype), above.to(product_dtype)
        before = F.linear(normal, wide_in, in_bias.to(product_dtype))
        d_before = torch.ops.aten.gelu_backward(low @ wide_out, before) * gate.to(product_dtype)
        d_rows, *d_norm = torch.ops.aten.native_layer_norm_backward(
            (d_before @ wide_in).to(y.dtype), rows, width, mean, rstd, norm_weight, norm_bias,
            [True, not frozen, not frozen],
        )  # fmt: skip
        torch.add(above, d_rows, out=below)
        if not frozen:
            d_in, d_in_bias = d_before.t() @ normal, d_before.sum(dim=0, dtype=y.dtype)
            d_out, d_out_bias = low.t() @ F.gelu(before), above.sum(dim=0)  # without the gate
            for total, part in zip(sums, (d_in, d_in_bias, d_out, d_out_bias, *d_norm), strict=True):
                total += part
    if frozen:
        return (dy,)
    d_in, d_in_bias, d_out, d_out_bias, *d_norm = sums
    # Σ_n ∂out · FFN(y) over the gate, without another pass over the tokens.
    d_alpha = ((d_out * out_weight).sum() + d_out_bias @ out_bias) * (1 - gate * gate)
    return dy, d_alpha, d_in, d_in_bias, d_out * gate, d_out_bias * gate, *d_norm
