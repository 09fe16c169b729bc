"""One step's gradients: how classification and terms meet in the encoder.

Both procedures leave in ``.grad`` what one backward of ``cross_entropy + Σ weight * loss`` would: they differ in what
crosses the cut and in cost. Terms see clean features and what the defenses made of them, the server only the latter.

The names of a step's regions are those under which a trace shows them (:mod:`cem.training.tracing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from cem.models import SplitModel
from cem.terms import Batch
from cem.training.weighted import Answer, WeightedTerm, all_finite, gradients, trained_parameters


@dataclass
class Step:
    """What a step measured; 0-dim tensors on the device, detached, so that reading them is the caller's decision.

    Attributes:
        cross_entropy: mean over the batch.
        correct: number of samples classified correctly, int64.
        answers: by the keys of the terms that had a weight.
    """

    cross_entropy: Tensor
    correct: Tensor
    answers: dict[str, Answer] = field(default_factory=dict)


def combined(
    model: SplitModel, terms: Sequence[WeightedTerm], images: Tensor, labels: Tensor, amp: bool = False
) -> Step:
    """Compute the gradients of one step with a single backward of the encoder.

    The server and every term get detached copies of what crosses the cut and answer with gradients for it; the encoder
    runs backward once, from the sum. This is what a split system can do: only features and their gradients cross it.

    Gradients accumulate into ``.grad``, as always; clear them first.

    Args:
        model: has ``encoder``, ``defense`` and ``server``.
        terms: those with a weight in this epoch measure; all may train an adversary first. Their parameters with
            ``requires_grad`` get the weighted gradient of their own loss.
        images: ``[B, C, H, W]``.
        labels: ``[B]``, int64.
        amp: encoder and server compute under bfloat16 autocast. What crosses the cut, the losses and the terms are
            fp32 all the same.
    """
    with record_function("encoder forward"):
        z = _encode(model, images, amp)
    with record_function("server"):
        clean = z.detach().requires_grad_()
        sent = model.defense(clean)
        received = sent.detach().requires_grad_()
        logits = _classify(model, received, amp)
        cross_entropy = F.cross_entropy(logits, labels)
        cross_entropy.backward()
    step = Step(cross_entropy.detach(), _correct(logits, labels))
    sent_grad = received.grad
    assert sent_grad is not None
    batch = Batch(images, labels, z.detach(), sent.detach())
    for each in terms:
        with each.watch, record_function(each.key):
            each.before_step(batch)
            if each.now > 0:
                answer = step.answers[each.key] = each.answer(batch)
                sent_grad = _added(sent_grad, answer.sent_grad, answer.finite, each.now)
                _train_own(each, answer)
    with record_function("encoder backward"):
        sent.backward(sent_grad)
        z_grad = clean.grad
        assert z_grad is not None
        for each in terms:
            if each.now > 0:
                answer = step.answers[each.key]
                z_grad = _added(z_grad, answer.features_grad, answer.finite, each.now)
        z.backward(z_grad)
    return step


def two_pass(
    model: SplitModel, terms: Sequence[WeightedTerm], images: Tensor, labels: Tensor, amp: bool = False
) -> Step:
    """The original procedure, kept to check :func:`combined` against; arguments and result are the same.

    Gradients of every term through the encoder first, then those of the cross-entropy, and their weighted sum.
    """
    with record_function("encoder forward"):
        z = _encode(model, images, amp)
    with record_function("server"):
        sent = model.defense(z)
        logits = _classify(model, sent, amp)
        cross_entropy = F.cross_entropy(logits, labels)
    step = Step(cross_entropy.detach(), _correct(logits, labels))
    # A defense may hold its term as a part: what is the term's own gets its gradient once.
    theirs = {id(parameter) for each in terms for parameter in each.term.parameters()}
    client = [
        p for p in (*trained_parameters(model.encoder), *trained_parameters(model.defense)) if id(p) not in theirs
    ]
    kept = []
    for each in terms:
        with each.watch, record_function(each.key):
            each.before_step(Batch(images, labels, z.detach(), sent.detach()))
            if each.now > 0:
                with each.term.together(Batch(images, labels, z, sent)) as whole:
                    loss, monitors, own_loss = each.term.measure(whole)
                own = trained_parameters(each.term)
                through = gradients(loss, client, retain_graph=True)
                of_own = gradients(own_loss, own, retain_graph=True)
                detached = {name: value.detach() for name, value in monitors.items()}
                finite = all_finite(loss, [*through, *of_own])
                answer = Answer(loss.detach(), detached, finite, None, None, of_own)
                step.answers[each.key] = answer
                _train_own(each, answer)
                kept.append((each.now, answer.finite, through))
    with record_function("server and encoder backward"):
        cross_entropy.backward()
    for weight, finite, grads in kept:
        for parameter, grad in zip(client, grads, strict=True):
            if grad is not None:
                own_grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = _added(own_grad, grad, finite, weight)
    return step


INJECTIONS: dict[str, Callable[..., Step]] = {"combined": combined, "two_pass": two_pass}
"""The procedures by the name that ``--injection`` takes."""


def _added(total: Tensor, grad: Tensor | None, finite: Tensor, weight: float) -> Tensor:
    """``total + weight * grad`` where that is finite, else ``total``: chosen on the device, which nobody waits for."""
    return total if grad is None else torch.where(finite, total + weight * grad, total)


def _train_own(each: WeightedTerm, answer: Answer) -> None:
    """Accumulate what a term's own parameters are trained on."""
    for parameter, grad in zip(trained_parameters(each.term), answer.own_grads, strict=True):
        if grad is not None:
            kept = torch.where(answer.finite, each.now * grad, 0.0)
            parameter.grad = kept if parameter.grad is None else parameter.grad + kept


def _encode(model: SplitModel, images: Tensor, amp: bool) -> Tensor:
    """Clean features of ``images``, fp32 and contiguous, whatever they were computed in."""
    if not amp:
        return model.encoder(images)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        z = model.encoder(images)
    return z.float().contiguous()


def _classify(model: SplitModel, received: Tensor, amp: bool) -> Tensor:
    """Logits for what the server receives, fp32 whatever they were computed in."""
    if not amp:
        return model.server(received)
    with torch.autocast(received.device.type, dtype=torch.bfloat16):
        logits = model.server(received)
    return logits.float()


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == labels).sum()
