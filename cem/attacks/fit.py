"""Train one network from features back to images until more training no longer helps it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem.attacks.base import Own, Progress
from cem.attacks.losses import LOSSES
from cem.attacks.networks import Average
from cem.attacks.observe import clean_features, defended, observe
from cem.data import ImageSet, make_loader
from cem.errors import DivergedError
from cem.models import SplitModel
from cem.training.evaluation import eval_mode, isolated_random

BATCH = 500  # images, where nothing is learned
FIRST_STEPS = 500  # of a first cycle, about
MOST_AVERAGED = 3  # networks whose answers are averaged
MOST_HOPE = 0.9
"""At most, what a cycle is taken to gain relative to the cycle before it, in extrapolation."""

_KEPT = {
    "network": dict,
    "snapshots": ({"epoch": int, "val_mse": float, "state": dict}, ...),
    "optimizer": dict,
    "random": dict,
    "curve": ({str: float}, ...),
    "cycles": (float, ...),
    "seconds": float,
}


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: Adam under cosine cycles with warm restarts (Loshchilov & Hutter 2017).

    Each cycle is twice as long as the one before. Training has *converged* after the first cycle that lowered the
    validation MSE by less than ``tolerance`` of it. A plateau at a constant rate would prove nothing: errors fall again
    when the rate does.

    Attributes:
        cycle_epochs: passes in the first cycle.
        max_cycles: bound on the cycles.
        tolerance: see above; ``None``: nobody can say whether it converged.
        batch_size: images in a step.
        lr: rate at the start of every cycle.
        last_lr: rate at its end.
        weight_decay: L2 penalty.
        amp: bfloat16 autocast.
    """

    cycle_epochs: int = 5
    max_cycles: int = 5
    tolerance: float | None = 0.03
    batch_size: int = 64
    lr: float = 2e-3
    last_lr: float = 2e-5
    weight_decay: float = 0.0
    amp: bool = False

    def cycles(self) -> list[int]:
        """Their lengths."""
        return [self.cycle_epochs * 2**number for number in range(self.max_cycles)]

    def epochs(self) -> int:
        """All of them together, at most."""
        return sum(self.cycles())


def usual_cycle(images: int, batch_size: int) -> int:
    """Passes over so many images that make about 500 steps, 1 to 5."""
    return min(5, max(1, round(FIRST_STEPS / math.ceil(images / batch_size))))


PUBLISHED = Schedule(50, 1, None, batch_size=256, lr=1e-3, last_lr=1e-5, weight_decay=1e-4)
"""Of the attack of arXiv:2503.00383."""


@dataclass
class Fitted:
    """What came of a training.

    Attributes:
        network: the average of the best networks of some cycles, in evaluation mode; of ``best_epoch`` the first.
        val_mse: its validation MSE.
        curve: per epoch ``epoch``, ``lr`` (of its last step), ``train_loss`` and ``val_mse``.
        cycles: the smallest ``val_mse`` until the end of each cycle.
        best_epoch: with the smallest ``val_mse``, from 1.
        converged: see :class:`Schedule`; ``None`` where nobody can say.
        seconds: of training and validation.
    """

    network: Average
    val_mse: float
    curve: list[dict[str, float]]
    cycles: list[float]
    best_epoch: int
    converged: bool | None
    seconds: float

    @property
    def gains(self) -> list[float]:
        """By how much each cycle but the first lowered the validation MSE, as a fraction of it."""
        return [1 - after / before for before, after in zip(self.cycles, self.cycles[1:], strict=False)]

    @property
    def extrapolated_gain(self) -> float | None:
        """What endless training might gain still, as a fraction: as if cycles went on to gain as the last two did.

        ``None`` with fewer than three cycles.
        """
        if len(self.gains) < 2:
            return None
        before, last = self.gains[-2:]
        ratio = min(MOST_HOPE, last / before) if before > 0 else 0.0
        return 1 - math.exp(math.log1p(-last) * ratio / (1 - ratio)) if last > 0 else 0.0


def fit_network(
    model: SplitModel,
    network: nn.Module,
    loss: str,
    own: Own,
    val_sent: Tensor,
    schedule: Schedule,
    *,
    queries: int,
    seed: int,
    progress: Progress,
    name: str,
    report: Callable[[int], object] = lambda epoch: None,
) -> Fitted:
    """Train ``network`` to invert what crosses the cut of ``model``, and keep it after every cycle.

    What comes of it is the average of the best networks of one, two or three cycles, as many as do best on validation
    images: cycles end in different minima, and what those get wrong differs (Huang et al., "Snapshot Ensembles", 2017).

    Every pass sees new draws of the defense. Where an earlier call was cut off, or had a smaller bound, training goes
    on after its last whole cycle, to the numbers of a call that was never cut off.

    Args:
        model: in evaluation mode, on its device; the target, or an attacker's shadow of it.
        network: untrained, on that device; trained in place.
        loss: a name in :data:`~cem.attacks.losses.LOSSES`.
        own: trains on ``train``, validates on ``val``.
        val_sent: features of ``own.val`` as they crossed the cut.
        schedule: lengths and rates.
        queries: how often each image is seen, and averaged.
        seed: of order and noise.
        progress: keeps the network under ``name``.
        report: called with the number of epochs so far after each.

    Raises:
        DivergedError: the loss of an epoch is not finite.
    """
    device = next(network.parameters()).device
    with isolated_random(seed, device):  # even a loader that does not shuffle draws
        view = _View(model, own.train, queries)
    batches = make_loader(
        view.images,
        min(schedule.batch_size, len(own.train)),
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    network = network.to(memory_format=torch.channels_last)  # a quarter faster on processors, more under autocast
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    lengths, curve, cycles, before = schedule.cycles(), [], [], 0.0
    snapshots: list[dict[str, Any]] = []  # the smallest error first
    with isolated_random(seed, device):
        kept = progress.kept(name, _KEPT)
        if kept is not None and sum(lengths[: len(kept["cycles"])]) == len(kept["curve"]):
            curve, cycles, snapshots, before = kept["curve"], kept["cycles"], kept["snapshots"], kept["seconds"]
            network.load_state_dict(kept["network"])
            optimizer.load_state_dict(kept["optimizer"])
            _restore(kept["random"], batches.generator, device)
        began = time.perf_counter()
        for length in lengths[len(cycles) :]:
            if _converged(cycles, schedule):
                break
            best: dict[str, Any] = {}
            for number in range(length):
                rates = _cosine(schedule, length * len(batches), number * len(batches))
                train_loss, lr = _epoch(view, network, loss, batches, optimizer, rates, schedule.amp, len(curve) + 1)
                val_mse = mse(network, val_sent, own.val)
                if not math.isfinite(val_mse):
                    raise DivergedError(
                        f"the validation MSE of {name} in epoch {len(curve) + 1} is not finite; lower the rate"
                    )
                curve.append({"epoch": len(curve) + 1, "lr": lr, "train_loss": train_loss, "val_mse": val_mse})
                report(len(curve))
                if not best or val_mse < best["val_mse"]:
                    state = copy.deepcopy(network.state_dict())
                    best = {"epoch": len(curve), "val_mse": val_mse, "state": state}
            snapshots = sorted([*snapshots, best], key=lambda each: each["val_mse"])[:MOST_AVERAGED]
            cycles.append(snapshots[0]["val_mse"])
            seconds = before + time.perf_counter() - began
            going_on = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            going_on["random"] = _random_state(batches.generator, device)
            facts = {"curve": curve, "cycles": cycles, "snapshots": snapshots, "seconds": seconds}
            progress.keep(name, {**going_on, **facts})
    average, val_mse = _average(network, [each["state"] for each in snapshots], val_sent, own.val, loss)
    converged = None if schedule.tolerance is None else _converged(cycles, schedule)
    seconds = before + time.perf_counter() - began
    return Fitted(average, val_mse, curve, cycles, snapshots[0]["epoch"], converged, seconds)


def _average(
    network: nn.Module, states: list[dict[str, Any]], sent: Tensor, images: ImageSet, loss: str
) -> tuple[Average, float]:
    """Of the averages of the first networks with these ``states``, the one that does best, and its MSE."""
    members, scores, pixels = [], [], images.images.float() / 255
    total = torch.zeros_like(pixels)
    for number, state in enumerate(states, start=1):
        members.append(copy.deepcopy(network))
        members[-1].load_state_dict(state)
        total += decode(members[-1], sent)
        scores.append((LOSSES[loss](total / number, pixels).item(), F.mse_loss(total / number, pixels).item()))
    best = min(range(len(scores)), key=lambda number: scores[number][0])
    return Average(members[: best + 1]).eval(), scores[best][1]


def _converged(cycles: list[float], schedule: Schedule) -> bool:
    """Whether the last cycle gained less than the tolerance; one alone says nothing."""
    return schedule.tolerance is not None and len(cycles) > 1 and cycles[-1] > (1 - schedule.tolerance) * cycles[-2]


def _random_state(order: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    own = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), "order": order.get_state(), **own}


def _restore(state: Mapping[str, Tensor], order: torch.Generator, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    order.set_state(state["order"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _cosine(schedule: Schedule, steps: int, first: int) -> Iterator[float]:
    """Rates of a cycle's steps, from ``first`` on."""
    for step in range(first, steps):
        height = (1 + math.cos(math.pi * step / steps)) / 2
        yield schedule.last_lr + (schedule.lr - schedule.last_lr) * height


class _View:
    """A set of images, and what the attacker sees of them.

    Attributes:
        images: as given, but every image's label is its position, by which its features are found again.
    """

    def __init__(self, model: SplitModel, images: ImageSet, queries: int) -> None:
        self.model, self.queries = model, queries
        self.images = replace(images, labels=torch.arange(len(images)))
        self._clean = clean_features(model, images)

    def __call__(self, images: Tensor, positions: Tensor) -> Tensor:
        """Features of ``images``, under new draws of the defense."""
        if self._clean is None:
            return observe(self.model, images, self.queries)
        return defended(self.model, self._clean[positions.to(self._clean.device)], self.queries)


def _epoch(
    view: _View, network: nn.Module, loss: str, batches: Any, optimizer: torch.optim.Optimizer,
    rates: Iterator[float], amp: bool, number: int,
) -> tuple[float, float]:  # fmt: skip
    """One pass over the attacker's images: the mean loss, and the learning rate of the last step."""
    network.train()
    device, lr = next(network.parameters()).device, 0.0
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for images, positions in batches:
        images = images.to(device, non_blocking=True)
        z = view(images, positions)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            reconstructions = network(z)
        value = LOSSES[loss](reconstructions.float(), images)
        value.backward()
        lr = optimizer.param_groups[0]["lr"] = next(rates)
        optimizer.step()
        total += value.detach().double() * len(images)
        count += len(images)
    mean = total.item() / count
    if not math.isfinite(mean):
        raise DivergedError(f"the network's loss in epoch {number} is {mean}; lower the rate")
    return mean, lr


@torch.no_grad()
def decode(network: nn.Module, sent: Tensor) -> Tensor:
    """What ``network`` makes of features ``[N, *feature_shape]``: float32 ``[N, C, H, W]``, on the CPU."""
    device = next(network.parameters()).device
    with eval_mode(network):
        return torch.cat([network(z.to(device)).float().cpu() for z in sent.split(BATCH)])


def mse(network: nn.Module, sent: Tensor, images: ImageSet) -> float:
    """Mean squared error of what ``network`` makes of the features of ``images``."""
    pieces = zip(sent.split(BATCH), images.images.split(BATCH), strict=True)
    errors = [F.mse_loss(decode(network, z), x.float() / 255).item() * len(x) for z, x in pieces]
    return sum(errors) / len(images)


def steps_of(images: ImageSet, schedule: Schedule) -> int:
    """Steps of a training at most."""
    return schedule.epochs() * math.ceil(len(images) / min(schedule.batch_size, len(images)))


def seconds_of_training(own: Own, schedule: Schedule, step: float) -> float:
    """Seconds that a training takes at most where a step takes ``step``; validation costs a third of it an image."""
    share = len(own.val) / (3 * len(own.train))
    return steps_of(own.train, schedule) * step * (1 + share)


def one_step(
    model: SplitModel, network: nn.Module, loss: str, images: ImageSet, schedule: Schedule, queries: int
) -> Callable[[], None]:
    """A step of such a training, for timing; it spoils ``network``."""
    device = next(network.parameters()).device
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0, fused=True)
    x = images.images[: schedule.batch_size].to(device).float() / 255
    with torch.no_grad():
        clean = model.encoder(x)

    def step() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=schedule.amp):
            guess = network(defended(model, clean, queries))
        LOSSES[loss](guess.float(), x).backward()
        optimizer.step()

    return step
