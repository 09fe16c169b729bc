"""Which slots a token belongs to, once slots are final."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels import validation
from cem_kernels.groups import ClassGroups
from cem_kernels.slot_attention.weights import SlotAttentionWeights, absorb


def slot_assignments(tokens: Tensor, slots: Tensor, groups: ClassGroups, weights: SlotAttentionWeights) -> Tensor:
    """The attention ``p`` of :func:`cem_kernels.slot_attention` for the slots that it has returned.

    Plain PyTorch on every device: two small products, differentiable, without a host synchronization.

    Args:
        tokens: ``[B, T, D]``.
        slots: ``[K, S, D]``.
        groups: the batch's classes, ``B`` samples and ``K`` classes.
        weights: see :class:`SlotAttentionWeights`.

    Returns:
        ``[B, T, S]``, of sum 1 over the slots of the token's class, in fp32 (fp64 for fp64 tokens).

    Raises:
        TypeError, ValueError: as in :func:`cem_kernels.slot_attention`.
    """
    validation.check_float("tokens", tokens)
    validation.check_shape("tokens", tokens, {"B": groups.num_samples, "T": None, "D": None})
    width = tokens.shape[2]
    validation.check_float("slots", slots)
    validation.check_shape("slots", slots, {"K": groups.num_classes, "S": None, "D": width})
    validation.check_weights(tokens, weights, weights.expected_shapes())
    validation.check_together(tokens, [("slots", slots), ("groups", groups.order)])
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        w = SlotAttentionWeights(*(weight.to(dtype) for weight in weights))
        query_map, _ = absorb(w)
        inputs = F.layer_norm(tokens.to(dtype), (width,), w.norm_inputs_weight, w.norm_inputs_bias)
        queries = F.layer_norm(slots.to(dtype), (width,), w.norm_slots_weight, w.norm_slots_bias) @ query_map
        return torch.softmax(torch.bmm(inputs, queries.index_select(0, groups.labels).mT), dim=2)
