"""The strongest ways to do an operator's work without this library, for comparison in the same run.

Each peer is a plain function of the operator's differentiable inputs and of :class:`Classes`, prepared before any clock
starts. Everything that it computes per token stays in the tokens' dtype; statistics are fp32, as here. All of
them compile whole (``fullgraph=True``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cem_kernels import CrossAttentionWeights, LogHinge, Nats, RunningMoments, RunningSlots, SlotAttentionWeights
from cem_kernels.slot_variance import running as rates
from cem_kernels.variance.running import VARIANCES_MOVE, Spread, judged


@dataclass(eq=False)
class Classes:
    """Everything about the labels that an operator's peer may know beforehand."""

    labels: Tensor  # [B]
    counts: Tensor  # [K]
    offsets: Tensor  # [K + 1]
    order: Tensor  # [B] samples sorted by class
    rank: Tensor  # [B] where each sample is in that order
    size: int  # L, samples of the largest class
    row: Tensor  # [B] where each sample is among the K · L rows of a padded batch
    fill: Tensor  # [K · L] which sample each of those rows holds; 0 where it is padding
    mask: Tensor  # [K, L] which rows hold a sample

    @classmethod
    def of(cls, labels: Tensor, num_classes: int, size: int | None = None) -> Classes:
        """Without a bound ``size`` on the classes the largest one is read, which waits for the device."""
        counts = (labels[:, None] == torch.arange(num_classes, device=labels.device)).sum(dim=0)
        size = max(int(counts.max()), 1) if size is None else size
        samples = torch.arange(len(labels), device=labels.device)
        order = torch.argsort(labels, stable=True)
        rank = torch.zeros_like(order).index_copy(0, order, samples)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        row = labels * size + rank - offsets[labels]
        fill = labels.new_zeros(num_classes * size).index_copy(0, row, samples)
        mask = torch.arange(size, device=labels.device) < counts[:, None]
        return cls(labels, counts, offsets, order, rank, size, row, fill, mask)


class Gather(torch.autograd.Function):
    """``rows[index]``, whose backward gathers too: autograd's own is a scatter with atomics.

    ``back [len(rows)]`` says at which place of the result each row is; the gradient of any other place that shows the
    same row is taken for zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class Pick(torch.autograd.Function):
    """``rows[index]`` of distinct rows; the backward writes them among zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy(0, index, grad), None


# Variances: features [B, C] to the means and the sums of squared deviations of every class and column, fp32 [K, C].

Moments = Callable[[Tensor, Classes], tuple[Tensor, Tensor]]


def padded_moments(features: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """A class-padded batch ``[K, L, C]``, masked. Compiled, the padding is a gather inside the two reductions."""
    padded = Gather.apply(features, classes.fill, classes.row).unflatten(0, classes.mask.shape)
    mask = classes.mask[:, :, None]
    wide = torch.where(mask, padded, 0).float()
    mean = wide.sum(dim=1) / classes.counts.clamp(min=1)[:, None]
    return mean, torch.where(mask, wide - mean[:, None], 0).square().sum(dim=1)


def index_add_moments(features: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """Two passes of ``index_add``: float atomics, so that two calls may differ in their last bits."""
    wide = features.float()
    zeros = wide.new_zeros(len(classes.counts), wide.shape[1])
    mean = zeros.index_add(0, classes.labels, wide) / classes.counts.clamp(min=1)[:, None]
    return mean, zeros.index_add(0, classes.labels, (wide - mean.index_select(0, classes.labels)).square())


def segment_reduce_moments(features: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """Two passes of ``torch.segment_reduce`` over a copy sorted by class."""

    def total(rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, "sum", offsets=classes.offsets, axis=0, unsafe=True, initial=0)

    wide = Gather.apply(features, classes.order, classes.rank).float()
    mean = total(wide) / classes.counts.clamp(min=1)[:, None]
    return mean, total((wide - mean.index_select(0, classes.labels[classes.order])).square())


MOMENTS: dict[str, Moments] = {
    "padded": padded_moments,
    "index-add": index_add_moments,
    "segment-reduce": segment_reduce_moments,
}


def relu_hinge(variance: Tensor, hinge: LogHinge) -> Tensor:
    """What each class pays, ``[K]``, for its ``variance [K, C]``."""
    assert isinstance(hinge.threshold, float)
    height = torch.log(variance.clamp(min=hinge.floor) + hinge.gamma) - math.log(hinge.threshold + hinge.gamma)
    return F.relu(height).mean(dim=1)


def variance_losses(squares: Tensor, classes: Classes, hinge: LogHinge) -> tuple[Tensor, Tensor]:
    """``squares [K, C]`` to ``rob_loss`` and ``intra_mse``: ReLU hinge, classes of two samples or more."""
    counts = classes.counts[:, None].to(squares.dtype)
    penalty = relu_hinge(squares / (counts - 1).clamp(min=1), hinge)
    weight = torch.where(classes.counts >= 2, classes.counts, 0).to(squares.dtype)
    weight = weight / weight.sum().clamp(min=1)
    return (weight * penalty).sum(), (weight * (squares / counts.clamp(min=1)).mean(dim=1)).sum()


def running_loss(
    mean: Tensor, squares: Tensor, classes: Classes, running: RunningMoments, momentum: float,
    hinge: LogHinge,
) -> tuple[Tensor, RunningMoments]:  # fmt: skip
    """``mean, squares [K, C]`` to ``rob_loss`` around running centroids, and these moved."""
    counts = classes.counts[:, None].to(squares.dtype)
    begun = running.batches[:, None] > 0
    centroids = torch.where(begun, running.centroids, mean.detach())
    around = squares / counts.clamp(min=1) + (mean - centroids).square()
    moved = torch.lerp(centroids, mean.detach(), 1 - momentum)
    variance = torch.where(begun, torch.lerp(running.variances, around.detach(), VARIANCES_MOVE), around.detach())
    batch = Spread(around.detach().mean(dim=1), (mean.square() + squares / counts.clamp(min=1)).detach().mean(dim=1))
    before = Spread(running.variances.mean(dim=1), (running.centroids.square() + running.variances).mean(dim=1))
    storable = (moved.isfinite() & variance.isfinite()).all(dim=1)
    verdict = judged(batch, before, classes.counts, hinge.unit, running.batches, running.ignored, storable)
    moves = verdict.moves[:, None]
    after = RunningMoments(
        torch.where(moves, moved, running.centroids),
        torch.where(moves, variance, running.variances),
        verdict.batches,
        verdict.ignored,
    )
    penalty = relu_hinge(variance + (around - around.detach()), hinge)
    weight = counts[:, 0] / counts.sum().clamp(min=1)
    return (weight * penalty).sum(), after


def padded_slots_loss(
    features: Tensor, classes: Classes, running: RunningSlots, penalty: Nats
) -> tuple[Tensor, RunningSlots]:
    """A class-padded batch ``[K, L, C]`` to ``rob_loss`` around slots of classes that have begun, and these moved."""
    centroids, variances, shares, *counters = running
    num_slots, wide = shares.shape[1], variances + penalty.unit
    x = Gather.apply(features, classes.fill, classes.row).unflatten(0, classes.mask.shape).float()
    away, present = x[:, :, None] - centroids[:, None], classes.counts.clamp(min=1)[:, None]
    squares, seen = away.square(), away.detach()
    logits = shares.log()[:, None] - (seen.square() / wide[:, None] + wide.log()[:, None]).sum(dim=3) / 2
    attention = torch.softmax(logits / features.shape[1] ** 0.5, dim=2) * classes.mask[:, :, None]
    mass = attention.sum(dim=1)
    of_slot = attention / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
    weight, around = mass / present, torch.einsum("kls,klsc->ksc", of_slot, squares)
    part = (weight * num_slots)[..., None]
    steps = torch.einsum("kls,klsc->ksc", of_slot, seen)
    moved = centroids + rates.CENTROIDS_MOVE * part * steps
    variance = torch.lerp(variances, around.detach(), (VARIANCES_MOVE * part).clamp(max=rates.MOST))
    share = torch.lerp(shares, weight, rates.CENTROIDS_MOVE)
    penalties = (weight * penalty.cost(variance + (around - around.detach())).mean(dim=2)).sum(dim=1)
    # A slot that has died.
    likeliest = torch.where(classes.mask, logits.amax(dim=2), math.inf)
    worst = x.detach().take_along_dim(likeliest.argmin(dim=1)[:, None, None], dim=1)
    least, most = share.min(dim=1, keepdim=True), share.max(dim=1, keepdim=True)
    dead, slots = least[0] < rates.DEAD / num_slots, torch.arange(num_slots, device=x.device)
    replaced, halved = dead & (slots == least[1]), dead & ((slots == least[1]) | (slots == most[1]))
    kept = (
        torch.where(replaced[..., None], worst, moved),
        torch.where(replaced[..., None], variance.take_along_dim(most[1][..., None], dim=1), variance),
        torch.where(halved, (least[0] + most[0]) / 2, share),
    )
    mse = (weight * around.detach().mean(dim=2)).sum(dim=1)
    square = torch.where(classes.mask, x.detach().square().mean(dim=2), 0).sum(dim=1) / present[:, 0]
    known = ((shares * each.mean(dim=2)).sum(dim=1) for each in (variances, centroids.square() + variances))
    storable = torch.stack([each.isfinite().flatten(1).all(dim=1) for each in kept]).all(dim=0) & mse.isfinite()
    verdict = judged(Spread(mse, square), Spread(*known), classes.counts, penalty.unit, *counters, storable)
    after = (
        torch.where(verdict.moves.view(-1, *(1,) * (each.dim() - 1)), each, old)
        for each, old in zip(kept, running[:3], strict=True)
    )
    loss = (classes.counts * penalties).sum() / classes.counts.sum().clamp(min=1)
    return loss, RunningSlots(*after, verdict.batches, verdict.ignored)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


# Slot attention: tokens [B, T, D] and slots [K, S, D] to slots [K, S, D].


def padded_slots(
    tokens: Tensor, slots: Tensor, w: SlotAttentionWeights, num_iterations: int, eps: float, classes: Classes
) -> Tensor:
    """A class-padded batch, masked; its keys and values ``[K, L·T, D]`` are made once, before the iterations.

    The softmax runs over slots, so fused attention does not apply; logits are ``[K, S, L·T]``, so that it runs along
    contiguous tokens.
    """
    num_classes, _, width = slots.shape
    inputs = layer_norm(tokens, w.norm_inputs_weight, w.norm_inputs_bias)
    padded = Gather.apply(inputs, classes.fill, classes.row).unflatten(0, classes.mask.shape).flatten(1, 2)
    k, v = F.linear(padded, w.to_k), F.linear(padded, w.to_v)
    mask = classes.mask.to(k.dtype).repeat_interleave(tokens.shape[1], dim=1)[:, None]  # [K, 1, L·T]
    present = (classes.counts > 0)[:, None, None]
    absent = (~present).to(k.dtype)  # keeps the sum over an empty class off zero
    rows = slots.flatten(0, 1)
    for _ in range(num_iterations):
        q = F.linear(layer_norm(rows, w.norm_slots_weight, w.norm_slots_bias), w.to_q) * width**-0.75
        attention = (torch.softmax(q.unflatten(0, (num_classes, -1)) @ k.mT, dim=1) + eps) * mask
        attention = attention / (attention.sum(dim=2, keepdim=True) + absent)
        updates = (attention @ v).flatten(0, 1)
        rows = torch.gru_cell(updates, rows, w.gru_weight_ih, w.gru_weight_hh, w.gru_bias_ih, w.gru_bias_hh)
        hidden = layer_norm(rows, w.norm_mlp_weight, w.norm_mlp_bias)
        hidden = F.relu(F.linear(hidden, w.mlp_in_weight, w.mlp_in_bias))
        rows = rows + F.linear(hidden, w.mlp_out_weight, w.mlp_out_bias)
    return torch.where(present, rows.view_as(slots), slots)


# Gated cross attention: tokens [B, T, D] and slots [K, S, D] to y [B, T, D].


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """``[..., N, D]`` to ``[..., H, N, d]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def queries_of(tokens: Tensor, w: CrossAttentionWeights) -> Tensor:
    return F.linear(layer_norm(tokens, w.ln_q_weight, w.ln_q_bias), w.to_q)


def keys_and_values(slots: Tensor, w: CrossAttentionWeights, num_heads: int) -> tuple[Tensor, Tensor]:
    """``[..., S, D]`` to keys and values, ``[..., H, S, d]`` each."""
    context = layer_norm(slots, w.ln_kv_weight, w.ln_kv_bias)
    return heads_of(F.linear(context, w.to_k), num_heads), heads_of(F.linear(context, w.to_v), num_heads)


def gated(tokens: Tensor, read: Tensor, w: CrossAttentionWeights) -> Tensor:
    """What was read, ``[B, T, D]``, through the output projection, the gate and the residual."""
    return tokens + torch.tanh(w.alpha_xattn) * F.linear(read, w.proj_weight, w.proj_bias)


def feed_forward(y: Tensor, w: CrossAttentionWeights) -> Tensor:
    """The gated feed-forward network behind the read."""
    hidden = F.gelu(F.linear(layer_norm(y, w.ln_ff_weight, w.ln_ff_bias), w.ffn_in_weight, w.ffn_in_bias))
    return y + torch.tanh(w.alpha_ffn) * F.linear(hidden, w.ffn_out_weight, w.ffn_out_bias)


def read_of_class(x: Tensor, slots: Tensor, w: CrossAttentionWeights, num_heads: int) -> Tensor:
    """The tokens ``[M, T, D]`` of one class after its ``slots [S, D]``."""
    k, v = keys_and_values(slots, w, num_heads)
    q = heads_of(queries_of(x, w).flatten(0, 1), num_heads)
    attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return gated(x, (attention @ v).transpose(0, 1).reshape(x.shape), w)


def looped_read(tokens: Tensor, slots: Tensor, w: CrossAttentionWeights, num_heads: int, classes: Classes) -> Tensor:
    """One class at a time with boolean masks, as first published."""
    y = torch.zeros_like(tokens)
    for label in torch.unique(classes.labels):
        mask = classes.labels == label
        y[mask] = read_of_class(tokens[mask], slots[label], w, num_heads)
    return y


def padded_read(tokens: Tensor, slots: Tensor, w: CrossAttentionWeights, num_heads: int, classes: Classes) -> Tensor:
    """Fused attention over a class-padded batch: queries ``[K, H, L·T, d]``, keys and values ``[K, H, S, d]``."""
    num_classes, size = classes.mask.shape
    k, v = keys_and_values(slots, w, num_heads)
    padded = Gather.apply(queries_of(tokens, w), classes.fill, classes.row)  # [K·L, T, D]
    q = heads_of(padded.unflatten(0, (num_classes, size)).flatten(1, 2), num_heads)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [K, L·T, H, d]
    return gated(tokens, Pick.apply(out.reshape(padded.shape), classes.row), w)


def gathered_read(tokens: Tensor, slots: Tensor, w: CrossAttentionWeights, num_heads: int, classes: Classes) -> Tensor:
    """Fused attention of every sample with its own copy of its class's keys and values: no padding, ``B·S`` keys."""
    k, v = (x.index_select(0, classes.labels) for x in keys_and_values(slots, w, num_heads))  # [B, H, S, d]
    out = F.scaled_dot_product_attention(heads_of(queries_of(tokens, w), num_heads), k, v)
    return gated(tokens, out.transpose(1, 2).reshape(tokens.shape), w)


BLOCK = 128  # FlexAttention's block masks have this granularity, and its lengths are padded to it


def padded_length(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def class_block_mask(classes: Classes, tokens_per_sample: int, num_slots: int) -> Any:
    """FlexAttention's document mask: tokens sorted by class see the slots of their class, all slots being side by side.

    Padding tokens are told the first class, so that no row is without a key; padding slots belong to no class.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    label = classes.labels[classes.order].repeat_interleave(tokens_per_sample)
    label = F.pad(label, (0, padded_length(len(label)) - len(label)))
    slots = padded_length(len(classes.counts) * num_slots)

    def same_class(batch: Tensor, head: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        return label[token] == slot // num_slots

    return create_block_mask(same_class, None, None, len(label), slots, device=str(label.device), BLOCK_SIZE=BLOCK)


def flex_read(
    tokens: Tensor, slots: Tensor, w: CrossAttentionWeights, num_heads: int, classes: Classes, block_mask: Any
) -> Tensor:
    """FlexAttention of all tokens, sorted by class, with all slots under :func:`class_block_mask`."""
    from torch.nn.attention.flex_attention import flex_attention

    def rows(x: Tensor) -> Tensor:  # [N, D] to [1, H, padded N, d]
        x = F.pad(x, (0, 0, 0, padded_length(x.shape[0]) - x.shape[0]))
        return heads_of(x[None], num_heads).contiguous()

    context = layer_norm(slots, w.ln_kv_weight, w.ln_kv_bias).flatten(0, 1)
    sorted_queries = Gather.apply(queries_of(tokens, w), classes.order, classes.rank)
    q = rows(sorted_queries.flatten(0, 1))
    k, v = rows(F.linear(context, w.to_k)), rows(F.linear(context, w.to_v))
    out = flex_attention(q, k, v, block_mask=block_mask)[0].transpose(0, 1).flatten(1)
    out = out[: sorted_queries.shape[0] * sorted_queries.shape[1]].reshape(sorted_queries.shape)
    return gated(tokens, Gather.apply(out, classes.rank, classes.order), w)
