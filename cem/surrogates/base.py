"""What every surrogate is: a term that also answers the call of the original module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from cem.options import Options as BaseOptions
from cem.terms import Batch, Context, Measured, Term, attached_zero, check_samples
from cem_kernels.validation import check_labels

ASSESSED = 128  # samples at a time, as a step has them by default


class Surrogate(Term):
    """A differentiable stand-in for the conditional entropy of features given their class.

    A subclass implements :meth:`~cem.Term.measure`, whose monitors have ``intra_mse``, the mean squared distance to the
    center, and says what it is called.

    Attributes:
        name: what ``--surrogate`` calls it.
        summary: one line for ``--help`` and reports.
        schedule: how its weight λ changes over a run unless the user says: ``constant``, or ``rising``, the original's.
        Options: its options; their ``weight`` is λ unless the user says.

    Example::

        >>> import torch, cem
        >>> class Spread(cem.Surrogate):
        ...     def measure(self, batch):
        ...         loss = batch.features.var()
        ...         return cem.Measured(loss, {"intra_mse": loss})
        >>> rob_loss, intra_mse = Spread()(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0]))
        >>> rob_loss
        tensor(2.)
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    schedule: ClassVar[Literal["constant", "rising"]] = "constant"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """Of a surrogate without options."""

        weight: ClassVar[float] = 1.0

    @classmethod
    def build(cls, options: Any, context: Context) -> Surrogate:
        """The surrogate of a run; by default ``cls()``."""
        return cls()

    if TYPE_CHECKING:

        def __call__(
            self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None, *, images: Tensor | None = None
        ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, features: Tensor, labels: Tensor, unique_labels: Tensor | None = None, *, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The penalty and its monitor, as the original module gives them.

        Args:
            features: ``[B, D]`` or ``[B, C, H, W]``, floating, clean (before noise), on the encoder's graph.
            labels: ``[B]``, integer classes, on the features' device; samples labeled −100 do not count.
            unique_labels: classes to restrict to (one host synchronization). The original passes
                ``torch.unique(labels)``, which is every class, and is the same as passing nothing.
            images: ``[B, C, H, W]``, for a surrogate that needs them.

        Returns:
            ``rob_loss``, 0-dim, fp32 or wider, attached to the graph of ``features``, and ``intra_mse``, 0-dim: the
            mean squared distance to the center, a monitor.

        Raises:
            TypeError: features are not floating-point, or labels are not integers.
            ValueError: shapes or devices do not fit, or a label is out of range.
        """
        if self.needs_images and images is None:
            raise ValueError(f"{type(self).__name__} needs images=[B, C, H, W]")
        if unique_labels is not None:
            check_samples(features, labels)
            check_labels(unique_labels, "unique_labels")
            chosen = torch.isin(labels.long(), unique_labels.long())
            features, labels = features[chosen], labels[chosen]
            images = None if images is None else images[chosen]
        batch = Batch(images, labels, features, features)
        with self.together(batch) as whole:
            measured = self.measure(whole)
        return measured.loss, measured.monitors["intra_mse"]

    @torch.no_grad()
    def assess(self, features: Tensor, labels: Tensor) -> float | None:
        """Its penalty of given features ``[N, ...]``: the mean over batches of 128 at random, in evaluation mode.

        A surrogate that is refitted after epochs is refitted to these; the surrogate itself stays as it is. ``None``
        for one that needs images.
        """
        if self.needs_images:
            return None
        twin = copy.deepcopy(self).eval()
        twin._group.leave()
        twin.after_epoch(features, labels)
        order = torch.randperm(len(labels)).to(features.device)
        losses = [twin(features[rows], labels[rows])[0].item() * len(rows) for rows in order.split(ASSESSED)]
        return sum(losses) / len(labels)


class NoSurrogate(Surrogate):
    """The third choice: no penalty. Both results are zeros attached to the graph."""

    name = "none"
    summary = "no penalty: the control"

    @dataclass(frozen=True)
    class Options(BaseOptions):
        """None."""

        weight: ClassVar[float] = 0.0

    def measure(self, batch: Batch) -> Measured:
        """See :class:`Surrogate`."""
        zero = attached_zero(batch.features)
        return Measured(zero, {"intra_mse": zero})

    def assess(self, features: Tensor, labels: Tensor) -> float | None:
        """It has no value."""
        return None
