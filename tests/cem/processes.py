"""What several processes do together in the tests: each function runs in all of them, and in one for comparison."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cem
from cem.models import SplitModel
from cem.training import injection
from cem.training.weighted import WeightedTerm

CLASSES, SAMPLES, STEPS = 4, 24, 20
SHAPE = (4, 2, 2)
CONTEXT = cem.Context(feature_shape=SHAPE, image_shape=(1, 4, 4), num_classes=CLASSES, noise_std=0.3)
CASES = {name: (name, {}) for name in cem.SURROGATES} | {
    "attention, a ramp, dropout": ("attention", {"ramp_from": 0.01, "dropout": 0.2, "reduction": "linear8"}),
    "attention, trained, positions": ("attention", {"trained": "shared", "spatial": True}),
    "mixture, full": ("mixture", {"fit": "full", "clusters": 3}),
}
SHARES = {1: [24], 2: [15, 9], 4: [9, 0, 11, 4]}
"""Samples of every process; in every fifth step the first one has them all."""


def own_rows(step, rank, size):
    """The rows of a batch that belong to a process."""
    shares = SHARES[size] if step % 5 else [SAMPLES, *[0] * (size - 1)]
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def samples(number, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CLASSES, (number,), generator=generator)
    return torch.randn(number, 1, 4, 4, dtype=torch.float64, generator=generator), labels.where(labels >= 0, -100)


def encoder():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Unflatten(1, SHAPE)).double()


def build(case):
    name, options = CASES[case]
    return cem.SURROGATES.build(name, CONTEXT, cem.SURROGATES[name].Options(**options))


def trained(build, rank, size, group=None):
    """Parameters and buffers after 20 steps of a loop as a user writes it, with a refit after ten."""
    torch.manual_seed(rank)  # the first process's random numbers are those of a process alone
    surrogate = build().double()
    client, server = encoder(), nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()
    network = nn.Sequential(client, server)
    shared = DistributedDataParallel(network, process_group=group) if size > 1 else network
    parameters = [each for module in (shared, surrogate) for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    kept = {}
    client.register_forward_hook(lambda module, inputs, output: kept.update(features=output))
    images, labels = samples(96, seed=1)
    for step in range(STEPS):
        if step in (0, 10):
            surrogate.before_epoch(step // 10, 2)
            part = slice(0, 96) if size == 1 else (slice(0, 40), slice(40, 96), slice(0, 0), slice(0, 0))[rank]
            surrogate.after_epoch(client(images[part]).detach(), labels[part])
        rows = own_rows(step, rank, size)
        x, y = (each[rows] for each in samples(SAMPLES, seed=10 + step))
        optimizer.zero_grad()
        right = F.cross_entropy(shared(x), y, reduction="sum", ignore_index=-100) * size / SAMPLES
        (right + 0.5 * surrogate(kept["features"], y)[0]).backward()
        optimizer.step()
    return {**network.state_dict(), **{f"surrogate.{name}": each for name, each in surrogate.state_dict().items()}}


class Adversary(cem.Term):
    """A decoder that learns in every step, on images, by an optimizer of its own."""

    needs_images = True

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(16, 16).double()
        self.adam = torch.optim.Adam(self.decoder.parameters(), lr=0.01)

    def error(self, batch):
        return F.mse_loss(self.decoder(batch.sent.flatten(1)), batch.images.flatten(1))

    def before_step(self, batch):
        self.adam.zero_grad()
        self.error(batch).backward()
        self.adam.step()

    def measure(self, batch):
        return cem.Measured(-self.error(batch), {})


def injected(rank, size):
    """The encoder's gradient of a split step with an adversary, and the adversary."""
    network = nn.Sequential(*encoder().float(), nn.Flatten(), nn.Linear(16, CLASSES))
    model = SplitModel.from_sequential(network, 4, image_shape=(1, 4, 4)).double()
    torch.manual_seed(rank)
    term = WeightedTerm("defenses.adversary", "adversary", Adversary(), lambda epoch: 0.5, 0, torch.device("cpu"))
    term.before_epoch(0, 1)
    images, labels = samples(SAMPLES, seed=3)
    rows = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    injection.combined(model, [term], images[rows], labels[rows].clamp(min=0))
    gradient = torch.cat([each.grad.flatten() for each in model.encoder.parameters()])
    if size > 1:
        dist.all_reduce(gradient)
    return {"gradient": gradient / size, **term.term.state_dict()}


def refused(rank, size):
    """What every process is told where one comes with labels that are none, or with other features."""
    surrogate, told = cem.CentroidCEM(16, CLASSES, 0.3), []
    for width, kind in ((16, torch.float32 if rank else torch.int64), (16 + rank, torch.int64)):
        try:
            surrogate(torch.zeros(6, width, requires_grad=True), torch.zeros(6, dtype=kind))
        except (TypeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def alone(rank, size):
    """What one process measures while the others are elsewhere, and the state after it."""
    if rank:
        return {}
    torch.manual_seed(0)
    surrogate, (features, labels) = cem.CentroidCEM(16, CLASSES, 0.3).double(), samples(SAMPLES, seed=4)
    with torch.no_grad():
        loss = surrogate.eval()(features.flatten(1), labels)[0]
    assessed = torch.tensor(surrogate.assess(features.flatten(1), labels))
    return {"loss": loss, "assessed": assessed, **surrogate.state_dict()}


def pairs(rank):
    """Of four processes, two and two train apart."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    return trained(partial(cem.CentroidCEM, 16, CLASSES, 0.3, process_group=group), rank % 2, 2, group)


def _work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    found = {case: trained(partial(build, case), rank, size) for case in CASES}
    found |= {"injected": injected(rank, size), "refused": refused(rank, size), "alone": alone(rank, size)}
    if size == 4:
        found["pairs"] = pairs(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def of_processes(size, folder: Path):
    """What each of ``size`` processes found."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_work, (size, folder), size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]
