"""Means of an epoch, gathered on the device without waiting for it in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from cem.training.injection import Step

RESERVED = {"", "loss", "weight", "seconds", "skipped"}
"""What a term's monitors cannot be called: the trainer has these."""


class EpochMeter:
    """Sums what the steps of an epoch measured; :meth:`read` is the only thing that waits for the device.

    Means weigh each step by its samples. Steps in which a term was not finite count for the classification figures and
    not for that term's.
    """

    def __init__(self, device: torch.device) -> None:
        self._samples = 0
        self._names: tuple[tuple[str, ...], ...] = ()
        self._total = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, step: Step, samples: int) -> None:
        """Count a step over ``samples`` samples."""
        means: dict[tuple[str, ...], Tensor] = {("cross_entropy",): step.cross_entropy}
        counts: dict[tuple[str, ...], Tensor] = {("correct",): step.correct}
        for key, answer in step.answers.items():
            if RESERVED & answer.monitors.keys():
                raise ValueError(f"monitors of {key} must not be called {', '.join(RESERVED & answer.monitors.keys())}")
            values = {"loss": answer.loss, **answer.monitors}
            means |= {(key, name): torch.where(answer.finite, value, 0.0) for name, value in values.items()}
            means[key, ""] = answer.finite
            counts[key, "skipped"] = ~answer.finite
        # fp64: the sum of an epoch of fp32 steps must not lose the digits that a bitwise resume would show.
        added = torch.stack([value.double() * samples for value in means.values()])
        added = torch.cat([added, torch.stack([value.double() for value in counts.values()])])
        names = (*means, *counts)
        if self._samples and names != self._names:
            raise ValueError(f"monitors must be the same in every step of an epoch, got {names} after {self._names}")
        self._total = added if self._samples == 0 else self._total + added
        self._names, self._samples = names, self._samples + samples

    def read(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Means of the classification, named as in ``metrics.csv``; and for the key of every term its mean ``loss`` and
        monitors, and ``skipped``, the number of steps in which it was not finite."""
        if self._samples == 0:
            return {"cross_entropy": 0.0, "train_accuracy": 0.0}, {}
        sums = dict(zip(self._names, self._total.tolist(), strict=True))
        own = {"cross_entropy": sums.pop(("cross_entropy",)), "train_accuracy": sums.pop(("correct",))}
        kept = {key[0]: sums.pop(key) for key in list(sums) if key[1] == ""}
        terms: dict[str, dict[str, float]] = {key: {} for key in kept}
        for (key, name), total in sums.items():
            terms[key][name] = total if name == "skipped" else total / max(kept[key], 1)
        return {name: total / self._samples for name, total in own.items()}, terms
