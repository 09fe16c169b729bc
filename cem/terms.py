"""The seam between training and whatever adds to its loss: terms, and the families that they come from."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cem.distributed import Group
from cem.errors import BackendError, UsageError
from cem.options import Options
from cem_kernels import BackendUnavailableError
from cem_kernels.validation import check_float, check_labels, check_not_negative, check_sample_shape, check_sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Batch:
    """What one step shows to a term.

    Letters: ``B`` samples; all tensors on one device.

    Attributes:
        images: ``[B, C, H, W]``, floating, as the encoder saw them, or ``None`` where nobody needs them.
        labels: ``[B]``, integer.
        features: ``z = f(x)``, clean, ``[B, D]`` or ``[B, C, H, W]``, fp32 in training.
        sent: what leaves the client, of the features' shape: transforms and noise of all defenses applied.

    Example::

        >>> import torch, cem
        >>> z = torch.randn(8, 4)
        >>> cem.Batch(images=None, labels=torch.arange(8) % 2, features=z, sent=z).sent.shape
        torch.Size([8, 4])
    """

    images: Tensor | None
    labels: Tensor
    features: Tensor
    sent: Tensor


class Measured(NamedTuple):
    """What a term says of a batch.

    Attributes:
        loss: 0-dim, fp32 or wider, differentiable in ``features`` or ``sent``; the trainer weighs it.
        monitors: 0-dim tensors by name, which become columns of ``metrics.csv``; no gradient is taken of them. Names
            such as ``loss``, ``weight``, ``seconds`` and ``skipped`` are the trainer's own. ``outliers`` says how much
            of the batch the term's state ignored, being too far from all before: the log warns once where it is not 0.
        own_loss: what the trainer trains the term's own parameters on, 0-dim, weighed as ``loss`` is, which it may be.
            ``None``: it does not train them.

    Example::

        >>> import torch, cem
        >>> cem.Measured(torch.tensor(0.5), {"spread": torch.tensor(2.0)}).own_loss is None
        True
    """

    loss: Tensor
    monitors: dict[str, Tensor]
    own_loss: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """All that a member of a family may know of the run that it is built for.

    Attributes:
        feature_shape: of one sample's features, ``(C, H, W)`` or ``(D,)``.
        image_shape: ``(C, H, W)`` of one image.
        num_classes: ``K``.
        noise_std: ``σ``, standard deviation of the noise at the cut, in units of the features.
        bounded: whether every feature lies in [0, 1], because the encoder ends in a sigmoid.
        backend: of the operators, see :mod:`cem_kernels.backends`.
        seed: of the run. Parameters may be drawn from PyTorch's global generators: they are seeded around ``build``.
        train_size: number of training images.

    Raises:
        ValueError: a shape, ``num_classes`` or ``noise_std`` is not what it says above.

    Example::

        >>> import cem
        >>> context = cem.Context(feature_shape=(8, 4, 4), image_shape=(3, 32, 32), num_classes=10, noise_std=0.1)
        >>> cem.SURROGATES.build("centroid", context).num_classes
        10
    """

    feature_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    noise_std: float
    bounded: bool = False
    backend: str = "auto"
    seed: int = 0
    train_size: int = 0

    def __post_init__(self) -> None:
        check_sample_shape("feature_shape", self.feature_shape, ("CHW", "D"))
        check_sample_shape("image_shape", self.image_shape, ("CHW",))
        check_sizes(num_classes=self.num_classes)
        check_not_negative(noise_std=self.noise_std)


class Term(nn.Module):
    """Whatever adds to the training loss. Its state lives in buffers and parameters, and so in checkpoints.

    A subclass overrides :meth:`measure`, and of the rest what it needs. Who calls :meth:`measure` or
    :meth:`before_step` does it with what :meth:`together` makes of the batch, so that a member only measures. A term
    stays in fp32 or wider where it is cast to half precision: running statistics would stand still there.

    Args:
        process_group: of ``torch.distributed``, whose processes measure their batches as one; ``None``: all of them,
            where it is initialized.

    Attributes:
        needs_images: whether ``measure`` or ``before_step`` reads ``batch.images``.
        capturable: whether ``measure`` never waits for the device, so that a CUDA graph can hold it.
        needs_epoch_features: whether :meth:`after_epoch` wants the features of the whole training set.

    Example::

        >>> import torch, cem
        >>> class Size(cem.Term):
        ...     def measure(self, batch):
        ...         return cem.Measured(batch.features.square().mean(), {})
        >>> z = torch.ones(2, 3)
        >>> Size().measure(cem.Batch(None, torch.tensor([0, 1]), z, z)).loss
        tensor(1.)
    """

    needs_images: ClassVar[bool] = False
    capturable: bool = True
    needs_epoch_features: bool = False

    def __init__(self, *, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self._group = Group(process_group)

    def together(self, batch: Batch, *, refit: bool = False) -> AbstractContextManager[Batch]:
        """The batch, checked, for the time of a ``with``; where there are several processes, their batches as one.

        Processes may have different numbers of samples, or none; all of them must come here equally often. What is
        measured inside is then the same in each, random numbers included. Gradients to a process's own features are
        times the number of processes: the mean that DistributedDataParallel makes of its parameters' gradients is that
        of one process with the whole batch. In evaluation mode and without a gradient, as where one process evaluates,
        it is the process's own batch.

        Args:
            batch: of this process.
            refit: whether the batch is for a refit, which is of all processes in any mode.

        Raises:
            TypeError: features are not floating-point, or labels are not integers.
            ValueError: shapes or devices do not fit, or processes do not fit together.
        """
        learns = refit or self.training or (torch.is_grad_enabled() and batch.features.requires_grad)
        if not (learns and self._group.shares):
            check_samples(batch.features, batch.labels)
            return nullcontext(batch)
        problem = None
        try:
            check_samples(batch.features, batch.labels)
            batch = replace(batch, labels=batch.labels.long())
        except (TypeError, ValueError) as error:
            problem = error
        return self._group.together(self, batch, problem)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return moved.float().copy_(tensor) if narrowed else moved

        return super()._apply(wide, recurse)

    def measure(self, batch: Batch) -> Measured:
        """The loss of a batch. In training mode it may move the term's state: the trainer calls it once a step."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers of its own parameters, by name; ``{}``: they stay as they are, or the network's trains them.

        Called once, after the term was moved to its device. The trainer saves them, and steps them after every step,
        which does nothing where there is no ``own_loss``: then :meth:`before_step` steps them.
        """
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that the network's optimizer trains beside the network's."""
        return []

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Move schedules. Called in every epoch, whatever the weight is.

        Args:
            epoch: counted from the first epoch in which the term has a weight, which is 0; before it, negative.
            epochs: how many there are from that one on.
        """

    def before_step(self, batch: Batch) -> None:
        """Train an adversary on a batch whose tensors are detached; called in every step, whatever the weight is.

        Gradients that it leaves in the term's parameters are cleared afterward.
        """

    def after_epoch(self, features: Tensor, labels: Tensor) -> Mapping[str, float]:
        """Refit on clean features ``[N, ...]`` and labels ``[N]`` of the whole training set.

        Each of several processes gives its own part of the set; the refit takes it through :meth:`together`.

        Returns:
            What the fit says of the features, by name: columns of ``metrics.csv``.
        """
        return {}

    def assess(self, features: Tensor, labels: Tensor) -> float | None:
        """Its value on given features ``[N, ...]`` with labels ``[N]``, moving nothing; ``None`` if it has none."""
        return None


def attached_zero(features: Tensor) -> Tensor:
    """A zero that belongs to the graph of ``features``: the sum of an empty slice.

    Its gradient is exactly zero even where ``features`` holds NaN or infinity, which ``0 * sum`` is not.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.flatten()[:0].sum(dtype=dtype)


def check_samples(features: Tensor, labels: Tensor) -> None:
    """Raise where features are not ``[B, D]`` or ``[B, C, H, W]`` with labels ``[B]`` on the same device.

    Labels' values are read where classes are told apart, once a step.
    """
    check_float("features", features)
    check_labels(labels)
    if features.dim() not in (2, 4) or math.prod(features.shape[1:]) == 0:
        raise ValueError(f"features must have shape [B, D] or [B, C, H, W], got {list(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape [B={len(features)}], got {list(labels.shape)}")
    if labels.device != features.device:
        raise ValueError(f"labels must be on the features' device {features.device}, got {labels.device}")


M = TypeVar("M", bound="type[Any]")


class Family(Generic[M]):
    """The members of a kind, such as surrogates, by name.

    A member is a class with a ``name``, a frozen dataclass ``Options`` of :class:`~cem.options.Options`, a one-line
    ``summary``, and ``build(options, context)``. A name is that of a registered member, or ``package.module:Class``.

    Args:
        kind: what its members are, and the option that chooses among them.
        base: class that every member derives from.
        aliases: other names of members.
        weighted: whether ``Options`` has a ``weight``.

    Example::

        >>> import cem
        >>> cem.SURROGATES["gmm"].name
        'mixture'
    """

    def __init__(self, kind: str, base: type, aliases: Mapping[str, str] = {}, *, weighted: bool = True) -> None:
        self.kind, self._base, self._aliases, self._weighted = kind, base, aliases, weighted
        self._members: dict[str, M] = {}

    def register(self, member: M) -> M:
        """Add a member under its ``name``; usable as a decorator.

        Raises:
            ValueError: another class has that name.
        """
        if self._members.setdefault(member.name, member) is not member:
            raise ValueError(f"{self.kind} {member.name!r} is {self._members[member.name]!r} already")
        return member

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __repr__(self) -> str:
        return f"Family({self.kind!r}: {', '.join(self)})"

    def __getitem__(self, name: str) -> M:
        """The member that ``name`` means.

        Raises:
            UsageError: there is none, or the class that is named cannot be one.
        """
        if ":" in name and name[0] not in ":.":
            return self._imported(name)
        member = self._members.get(self._aliases.get(name, name))
        if member is None:
            raise UsageError(
                f"--{self.kind} takes {', '.join(self)}, or package.module:Class for one of yours, got {name!r}"
            )
        return member

    def build(self, name: str, context: Context, options: Options | None = None) -> Any:
        """The member ``name`` for a run.

        Args:
            name: see :class:`Family`.
            context: the run.
            options: an instance of the member's ``Options``; its defaults if left out.

        Raises:
            UsageError: there is no such member, or it refuses its options or the run.
            BackendError: it does not have the backend that the run asks for by name.
        """
        member = self[name]
        try:
            return member.build(member.Options() if options is None else options, context)
        except BackendUnavailableError as error:
            raise BackendError(str(error)) from error
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"--{self.kind} {member.name}: {error}") from error

    def _imported(self, name: str) -> M:
        module, _, attribute = name.partition(":")
        try:
            member: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--{self.kind} {name}: {error}") from error
        fits = isinstance(member, type) and issubclass(member, self._base) and hasattr(member, "name")
        weighed = fits and (hasattr(member.Options, "weight") or not self._weighted)
        if not (fits and weighed and is_dataclass(member.Options)):
            raise UsageError(
                f"--{self.kind} {name} must be a class derived from {self._base.__module__}.{self._base.__name__}, "
                f"with a name and Options, a dataclass{' that has a weight' if self._weighted else ''}, got {member!r}"
            )
        found: M = member
        if self._members.get(found.name, found) is not found:
            raise UsageError(f"--{self.kind} {name} is called {found.name!r}, as {self._members[found.name]} is")
        return found
