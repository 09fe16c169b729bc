"""One step's gradients: how classification and penalty meet in the encoder.

Both procedures leave in ``.grad`` what one backward of ``cross_entropy + lambda_eff * rob_loss`` would: they
differ in what crosses the cut and in cost. The surrogate sees clean features, the server sees what the
defence made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def combined(
    model: SplitModel,
    surrogate: Surrogate | None,
    images: Tensor,
    labels: Tensor,
    lambda_eff: float,
    clock: AbstractContextManager[object] | None = None,
) -> Step:
    """Compute the gradients of one step with a single backward of the encoder.

    The server and the surrogate each get a detached copy of ``z`` and answer with a gradient for it; the
    encoder runs backward once, from the sum. This is what a split system can do: only ``z`` and ``∂/∂z``
    cross the cut.

    Gradients accumulate into ``.grad``, as always; clear them first.

    Args:
        model: has ``encoder``, ``defense`` and ``server``.
        surrogate: the penalty, or ``None`` for classification alone. Its parameters with ``requires_grad``
            get ``lambda_eff · ∂rob_loss``.
        images: ``[B, C, H, W]``.
        labels: ``[B]``, int64.
        lambda_eff: weight of the penalty, see :func:`cem.training.schedule.lambda_eff`.
        clock: entered around the work that the penalty causes.
    """
    z = model.encoder(images)
    server_z = z.detach().requires_grad_()
    logits = model.server(model.defense(server_z))
    cross_entropy = F.cross_entropy(logits, labels)
    cross_entropy.backward()
    z_grad = server_z.grad
    if surrogate is None:
        z.backward(z_grad)
        return _classified(cross_entropy, logits, labels)

    with clock or nullcontext():
        surrogate_z = z.detach().requires_grad_()
        rob_loss, intra_mse = surrogate(surrogate_z, labels)
        trained = _trained(surrogate)
        grads = torch.autograd.grad(rob_loss, [surrogate_z, *trained], materialize_grads=True)
        finite = _all_finite(rob_loss, grads)
        # torch.where, and not a branch: a branch would wait for the device in every step.
        z_grad = torch.where(finite, z_grad + lambda_eff * grads[0], z_grad)
        for parameter, grad in zip(trained, grads[1:], strict=True):
            _accumulate(parameter, torch.where(finite, lambda_eff * grad, 0.0))
    z.backward(z_grad)
    return _classified(cross_entropy, logits, labels, rob_loss, intra_mse, finite)


def two_pass(
    model: SplitModel,
    surrogate: Surrogate | None,
    images: Tensor,
    labels: Tensor,
    lambda_eff: float,
    clock: AbstractContextManager[object] | None = None,
) -> Step:
    """The original procedure, kept to check :func:`combined` against; arguments and result are the same.

    Backward of the penalty through surrogate and encoder, copy their gradients, clear, backward of the
    cross-entropy, add ``lambda_eff`` times the copy. ``.grad`` must be empty on entry: clearing is part of
    it.
    """
    z = model.encoder(images)
    logits = model.server(model.defense(z))
    cross_entropy = F.cross_entropy(logits, labels)
    if surrogate is None:
        cross_entropy.backward()
        return _classified(cross_entropy, logits, labels)

    with clock or nullcontext():
        rob_loss, intra_mse = surrogate(z, labels)
        rob_loss.backward(retain_graph=True)
        trained = _trained(model.encoder) + _trained(surrogate)
        copies = [(p, p.grad) for p in trained if p.grad is not None]
        for parameter in trained:
            parameter.grad = None
        finite = _all_finite(rob_loss, [grad for _, grad in copies])
    cross_entropy.backward()
    for parameter, grad in copies:
        own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = torch.where(finite, own + lambda_eff * grad, own)
    return _classified(cross_entropy, logits, labels, rob_loss, intra_mse, finite)


INJECTIONS: dict[str, Callable[..., Step]] = {"combined": combined, "two_pass": two_pass}
"""The procedures by the name that ``--injection`` takes."""


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
