"""Learning rate and penalty weight over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

DECAY = 5
"""Divisor of the learning rate after each quarter of the epochs: 60, 120 and 180 of the original's 240."""

LOW_LR = 4.1e-4
"""Learning rate below which the penalty applies in full; the original's constant."""


Shape = Literal["steps", "cosine"]


def epoch_lr(lr: float, epoch: float, epochs: int, shape: Shape = "steps") -> float:
    """Scheduled learning rate after ``epoch`` epochs, before warm-up.

    Args:
        lr: rate at the beginning.
        epoch: from 0 to ``epochs``.
        epochs: length of the run.
        shape: ``steps`` falls to a fifth after each quarter of the run, ``cosine`` falls evenly to 0.
    """
    if shape == "cosine":
        return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    # After the last step LambdaLR asks for another one.
    return lr / DECAY ** min(4 * int(epoch) // epochs, 3)


def lr_factor(
    epochs: int, steps_per_epoch: int, warmup_epochs: float, shape: Shape = "steps"
) -> Callable[[int], float]:
    """Factor on the base rate as a function of the step, for :class:`torch.optim.lr_scheduler.LambdaLR`.

    The warm-up counts steps. Counting it in batches while stepping it in epochs, as the original did, made
    the whole first epoch run at rate 0.
    """
    warmup_steps = warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
        return rise * epoch_lr(1.0, step / steps_per_epoch, epochs, shape)

    return factor


def lambda_eff(lambd: float, lr: float, warm_start: bool) -> float:
    """Weight of the penalty in an epoch: the original's rule.

    ``lambd`` if ``lr < 4.1e-4`` or the run started from trained weights, else ``lambd * 1e-3 / lr``. With the
    default rates (0.05, 0.01, 0.002, 0.0004) that is 0.02, 0.1, 0.5 and 1 times ``lambd``: classification is
    learned first, and the penalty grows as the steps shrink.

    Args:
        lambd: λ, the weight at low learning rates.
        lr: the epoch's scheduled rate *without* the warm-up factor. Warm-up rates are tiny, so with them the
            rule would give the first steps of an untrained network the strongest penalty of the whole run.
        warm_start: whether the initial weights came from another run (``--init-from``). Resuming a run
            (``--resume``) is not a warm start: it must not change the run's numbers.
    """
    return lambd if warm_start or lr < LOW_LR else lambd * 1e-3 / lr
