"""Order-independent sums of update vectors.

Floating-point addition depends on its order, and the order in which hospitals answer is chance. Each
weighted update is therefore rounded once to a multiple of 2**-FRACTION_BITS and summed in int64,
which is exact and associative: the same bits whatever the number of actors, whichever came first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector

FRACTION_BITS = 36
_SCALE = float(2**FRACTION_BITS)
_LIMIT = float(2**62)

IntVector = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PartialSum:
    """Sum of weight * update in fixed point, with the total weight; an int64 vector of shape [P]."""

    total: IntVector
    weight: int
    num_updates: int
    magnitude: float


def empty_sum(size: int) -> PartialSum:
    """Return the sum of no updates of P = size elements."""
    return PartialSum(np.zeros(size, dtype=np.int64), 0, 0, 0.0)


def add_update(partial: PartialSum, update: Vector, weight: int) -> PartialSum:
    """Add weight * update; the vector inside `partial` is reused, so keep only the returned sum.

    Raises:
      UpdateRejected: the update has the wrong shape, is not finite, or is so large that the sum would overflow.
    """
    if update.shape != partial.total.shape:
        raise UpdateRejected(f"the update has shape {update.shape}; the round needs {partial.total.shape}")
    largest = float(np.max(np.abs(update), initial=0.0)) * weight * _SCALE
    magnitude = partial.magnitude + largest
    if not np.isfinite(largest) or magnitude >= _LIMIT:
        raise UpdateRejected(
            "the update holds values that are not finite or too large to be summed; nothing of it was used"
        )
    scaled = update.astype(np.float64)
    scaled *= weight * _SCALE
    np.rint(scaled, out=scaled)
    np.add(partial.total, scaled.astype(np.int64), out=partial.total)
    return PartialSum(partial.total, partial.weight + weight, partial.num_updates + 1, magnitude)


def merge_sums(first: PartialSum, second: PartialSum) -> PartialSum:
    """Add two partial sums exactly.

    Raises:
      UpdateRejected: the sums have different shapes, or the total would overflow.
    """
    if first.total.shape != second.total.shape:
        raise UpdateRejected(f"partial sums of shapes {first.total.shape} and {second.total.shape} cannot be added")
    magnitude = first.magnitude + second.magnitude
    if magnitude >= _LIMIT:
        raise UpdateRejected("the partial sums are too large to be added")
    return PartialSum(
        first.total + second.total,
        first.weight + second.weight,
        first.num_updates + second.num_updates,
        magnitude,
    )


def plain_sum(partial: PartialSum) -> npt.NDArray[np.float64]:
    """Return the sum of weight * update, shape [P]; zeros where no update was added."""
    total: npt.NDArray[np.float64] = partial.total.astype(np.float64) / _SCALE
    return total


def weighted_mean(partial: PartialSum) -> Vector:
    """Return the weighted mean update as float32 of shape [P].

    Raises:
      UpdateRejected: no update was added.
    """
    if partial.weight <= 0:
        raise UpdateRejected("no update was added, so there is no mean")
    mean: Vector = (partial.total.astype(np.float64) / (_SCALE * partial.weight)).astype(np.float32)
    return mean
