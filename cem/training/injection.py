"""One step's gradients: how classification and penalty meet in the encoder.

Both procedures leave in ``.grad`` what one backward of ``cross_entropy + lambda_eff * rob_loss`` would: they
differ in what crosses the cut and in cost. The surrogate sees clean features, the server sees what the
defense made of them.

The names of a step's regions are those under which a trace shows them (:mod:`cem.training.tracing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from cem.models import SplitModel
from cem.surrogates.base import Surrogate


@dataclass
class Step:
    """What a step measured; 0-dim tensors on the device, detached, so that reading them is the caller's
    decision.

    Attributes:
        cross_entropy: mean over the batch.
        rob_loss: the penalty, before its weight; zero where ``skipped``.
        intra_mse: the surrogate's monitor; zero where ``skipped``.
        correct: number of samples classified correctly, int64.
        skipped: bool, whether the penalty or its gradient was not finite and was left out.
    """

    cross_entropy: Tensor
    rob_loss: Tensor
    intra_mse: Tensor
    correct: Tensor
    skipped: Tensor


class Penalty(NamedTuple):
    """The surrogate's answer to a batch; nothing of it is attached to a graph.

    Attributes:
        rob_loss, intra_mse: 0-dim, see :class:`~cem.surrogates.base.Surrogate`.
        finite: 0-dim bool, whether ``rob_loss`` and all gradients are.
        z_grad: ``∂rob_loss/∂z``, shaped like ``z``.
        grads: of each of the surrogate's parameters with ``requires_grad``, in their order: ``∂rob_loss``, or that of
            the loss of its own, where it has one.
    """

    rob_loss: Tensor
    intra_mse: Tensor
    finite: Tensor
    z_grad: Tensor
    grads: list[Tensor]


def penalty_of(surrogate: Surrogate, z: Tensor, labels: Tensor) -> Penalty:
    """Forward and backward of the surrogate: all that it does in a step, apart from the encoder and the weight.

    Args:
        surrogate: the penalty.
        z: clean features ``[B, ...]``; a detached copy of them is what the gradient is taken to.
        labels: ``[B]``, int64.
    """
    z = z.detach().requires_grad_()
    rob_loss, intra_mse = surrogate(z, labels)
    trained = _trained(surrogate)
    own_loss = surrogate.own_loss(z, labels) if trained else None
    if own_loss is None:
        grads = torch.autograd.grad(rob_loss, [z, *trained], materialize_grads=True)
    else:
        grads = torch.autograd.grad(rob_loss, [z], materialize_grads=True)
        grads += torch.autograd.grad(own_loss, trained, materialize_grads=True)
    return Penalty(rob_loss.detach(), intra_mse.detach(), _all_finite(rob_loss, grads), grads[0], list(grads[1:]))


def combined(
    model: SplitModel,
    surrogate: Surrogate | None,
    images: Tensor,
    labels: Tensor,
    lambda_eff: float,
    clock: AbstractContextManager[object] | None = None,
    penalize: Callable[[Tensor, Tensor], Penalty] | None = None,
    amp: bool = False,
) -> Step:
    """Compute the gradients of one step with a single backward of the encoder.

    The server and the surrogate each get a detached copy of ``z`` and answer with a gradient for it; the
    encoder runs backward once, from the sum. This is what a split system can do: only ``z`` and ``∂/∂z``
    cross the cut.

    Gradients accumulate into ``.grad``, as always; clear them first.

    Args:
        model: has ``encoder``, ``defense`` and ``server``.
        surrogate: the penalty, or ``None`` for classification alone. Its parameters with ``requires_grad``
            get ``lambda_eff`` times the gradient of what they are trained on.
        images: ``[B, C, H, W]``.
        labels: ``[B]``, int64.
        lambda_eff: weight of the penalty, see :func:`cem.training.schedule.lambda_eff`.
        clock: entered around the work that the penalty causes.
        penalize: ``(z, labels)`` → what :func:`penalty_of` gives for ``surrogate``, computed in another way.
        amp: encoder and server compute under bfloat16 autocast. What crosses the cut, the losses and the surrogate
            are fp32 all the same.
    """
    with record_function("encoder forward"):
        z = _encode(model, images, amp)
    with record_function("server"):
        server_z = z.detach().requires_grad_()
        logits = _classify(model, server_z, amp)
        cross_entropy = F.cross_entropy(logits, labels)
        cross_entropy.backward()
    z_grad, penalty = server_z.grad, None
    assert z_grad is not None
    if surrogate is not None:
        with clock or nullcontext(), record_function("surrogate"):
            penalty = (penalize or partial(penalty_of, surrogate))(z, labels)
            # torch.where, and not a branch: a branch would wait for the device in every step.
            z_grad = torch.where(penalty.finite, z_grad + lambda_eff * penalty.z_grad, z_grad)
            for parameter, grad in zip(_trained(surrogate), penalty.grads, strict=True):
                _accumulate(parameter, torch.where(penalty.finite, lambda_eff * grad, 0.0))
    with record_function("encoder backward"):
        z.backward(z_grad)
    if penalty is None:
        return _classified(cross_entropy, logits, labels)
    return _classified(cross_entropy, logits, labels, penalty.rob_loss, penalty.intra_mse, penalty.finite)


def two_pass(
    model: SplitModel,
    surrogate: Surrogate | None,
    images: Tensor,
    labels: Tensor,
    lambda_eff: float,
    clock: AbstractContextManager[object] | None = None,
    amp: bool = False,
) -> Step:
    """The original procedure, kept to check :func:`combined` against; arguments and result are the same.

    Backward of the penalty through surrogate and encoder, copy their gradients, clear, backward of the
    cross-entropy, add ``lambda_eff`` times the copy. ``.grad`` must be empty on entry: clearing is part of
    it.
    """
    with record_function("encoder forward"):
        z = _encode(model, images, amp)
    with record_function("server"):
        logits = _classify(model, z, amp)
        cross_entropy = F.cross_entropy(logits, labels)
    if surrogate is None:
        with record_function("server and encoder backward"):
            cross_entropy.backward()
        return _classified(cross_entropy, logits, labels)

    with clock or nullcontext(), record_function("surrogate"):
        rob_loss, intra_mse = surrogate(z, labels)
        rob_loss.backward(retain_graph=True)
        trained = _trained(model.encoder) + _trained(surrogate)
        copies = [(p, p.grad) for p in trained if p.grad is not None]
        for parameter in trained:
            parameter.grad = None
        finite = _all_finite(rob_loss, [grad for _, grad in copies])
    with record_function("server and encoder backward"):
        cross_entropy.backward()
    for parameter, grad in copies:
        own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = torch.where(finite, own + lambda_eff * grad, own)
    return _classified(cross_entropy, logits, labels, rob_loss, intra_mse, finite)


INJECTIONS: dict[str, Callable[..., Step]] = {"combined": combined, "two_pass": two_pass}
"""The procedures by the name that ``--injection`` takes."""


def _encode(model: SplitModel, images: Tensor, amp: bool) -> Tensor:
    """Clean features of ``images``, fp32 and contiguous, whatever they were computed in."""
    if not amp:
        return model.encoder(images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        z = model.encoder(images)
    return z.float().contiguous()


def _classify(model: SplitModel, z: Tensor, amp: bool) -> Tensor:
    """Logits for features ``z``, fp32 whatever they were computed in."""
    noisy = model.defense(z)
    if not amp:
        return model.server(noisy)
    with torch.autocast(z.device.type, dtype=torch.bfloat16):
        logits = model.server(noisy)
    return logits.float()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _all_finite(rob_loss: Tensor, grads: Iterable[Tensor]) -> Tensor:
    # A sum over squares or absolute values could overflow where every element is finite; this cannot.
    return torch.stack([rob_loss.isfinite(), *(grad.isfinite().all() for grad in grads)]).all()


def _accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def _classified(
    cross_entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    rob_loss: Tensor | None = None,
    intra_mse: Tensor | None = None,
    finite: Tensor | None = None,
) -> Step:
    zero = cross_entropy.new_zeros(())
    finite = torch.ones_like(zero, dtype=torch.bool) if finite is None else finite
    return Step(
        cross_entropy=cross_entropy.detach(),
        rob_loss=zero if rob_loss is None else torch.where(finite, rob_loss.detach(), 0.0),
        intra_mse=zero if intra_mse is None else torch.where(finite, intra_mse.detach(), 0.0),
        correct=(logits.detach().argmax(dim=1) == labels).sum(),
        skipped=~finite,
    )
