"""What the backends of variances share: their result, and what running centroids remember."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cem_kernels import validation

MOMENTUM, VARIANCES_MOVE = 0.97, 0.1
"""``1 − MOMENTUM`` of the way a batch moves centroids, and how far it moves variances, a class's first batch aside.

Centroids are to stand still, so that shrinking shows. Variances are only to be less noisy than a batch's: what they
were long ago would hide what was achieved since. A momentum of .99, means over the batches that there are before, let
an attacker behind a small client err less: at equal accuracy these rates leave him 1.06 times as much (95 %: .97 to
1.17, four seeds; on digits they gain nothing).
"""

OUTLIER, OF_A_SAMPLE = 2.0, 3.0
"""A batch is an outlier where its variance is above ``OUTLIER + OF_A_SAMPLE / √samples`` times the running one.

Few samples fluctuate, the more the fewer columns are alive. What the largest batch that is none adds to the running
variance has fallen to ``0.1 · 0.9¹⁰ = 3.5 %`` of the excess ten batches later: 5 % of it for 64 samples, 14 % for a
single one. Features that grow by 1 % a batch are followed without an outlier, those that grow by 5 % only where their
means are no larger than their spread.
"""

OUTGROWN = 1.5
"""A class begins anew where its moments are above ``OUTGROWN`` times the limit of an outlier times a batch's."""

EARLY = 10
"""Batches that a class is not told apart by: its moments are hardly known. In twice as many it may begin anew.

Later an outlier that its moments began with is forgotten by itself.
"""

PATIENCE = 10
"""Outliers in a row that are a lasting change, after which a class begins anew: as many batches as variances look
back."""


class ClassVariance(NamedTuple):
    """Result of a variance operator, in fp32 (fp64 for fp64 features), attached to the graph of the features."""

    rob_loss: Tensor  # [] mean of class_penalty over classes, weighted by their samples
    intra_mse: Tensor  # [] mean of class_mse, likewise
    class_penalty: Tensor  # [K], exactly 0 where a class has too few samples
    class_mse: Tensor  # [K], likewise


class RunningMoments(NamedTuple):
    """What :func:`cem_kernels.variance.centroid_variance` remembers of the batches before: zeros to begin with, each
    tensor with memory of its own.

    Letters: ``K`` classes, ``C`` columns.
    """

    centroids: Tensor  # [K, C] fp32, no gradient
    variances: Tensor  # [K, C] fp32, around the centroids
    batches: Tensor  # [K] int64, how many moved each class since it began; of 0, moments are not looked at
    ignored: Tensor  # [K] int64, outliers in a row before this batch


class Spread(NamedTuple):
    """How far features lie, in means over columns: ``[K]``, or as many as there are moments to decide on."""

    around: Tensor  # the running centroid: a batch's mean square, or the running variance
    zero: Tensor  # zero: the second moment


class Verdict(NamedTuple):
    """What becomes of moments, ``[K]`` each."""

    moves: Tensor  # bool, whether centroids and variances move
    batches: Tensor  # int64, as they are afterward, and
    ignored: Tensor  # likewise


def judged(
    batch: Spread, running: Spread, samples: Tensor, unit: float, batches: Tensor, ignored: Tensor, storable: Tensor
) -> Verdict:
    """Whether a batch moves the moments of each class, so that one that is far off does not silence the penalty.

    One decision for all columns of a class: ordinary training is not touched by a bit. An outlier changes nothing, but
    a row of ``PATIENCE`` is a lasting change, and early moments that later batches do not bear out were outliers
    themselves: then the class begins anew, and its next batch sets the moments.

    Args:
        batch: what it shows.
        running: what the batches before showed.
        samples: of each class in the batch.
        unit: of the penalty, the variance that it begins to notice; see :attr:`cem_kernels.Nats.unit`.
        batches, ignored: of :class:`RunningMoments`.
        storable: whether all that would be kept is finite; else the batch is neither counted nor an outlier.
    """
    limit = OF_A_SAMPLE * samples.clamp(min=1).to(batch.around.dtype).rsqrt() + OUTLIER
    shown, known = batch.around + unit, running.around + unit
    counts = storable & (samples > 0)
    outlier = counts & (batches >= EARLY) & (shown > limit * known)
    moves = counts ^ outlier  # those that count and are none
    ignored = (ignored + outlier).masked_fill(moves, 0)
    after = batches + moves
    if validation.values_are_checked(batches) and not bool((outlier | (batches < 2 * EARLY)).any()):
        return Verdict(moves, after, ignored)  # as nearly always, and what follows would change nothing
    far = OUTGROWN * limit
    outgrown = (far * shown < known) | (far * (batch.zero + unit) < running.zero + unit)
    anew = (moves & (batches > 0) & (batches < 2 * EARLY) & outgrown) | (outlier & (ignored >= PATIENCE))
    return Verdict(moves, after.masked_fill(anew, 0), ignored)
