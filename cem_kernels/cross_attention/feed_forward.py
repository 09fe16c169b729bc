"""The gated feed-forward network behind cross attention: two library matrix products in every fast backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels.cross_attention.weights import CrossAttentionWeights


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
