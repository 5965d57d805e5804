"""Order-independent sums of update vectors.

Floating-point addition depends on its order, and the order in which hospitals answer is chance. Each
weighted update is therefore rounded once to a multiple of 2**-FRACTION_BITS and summed in int64,
which is exact and associative: the same bits whatever the number of actors, whichever came first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector

FRACTION_BITS = 36
_SCALE = float(2**FRACTION_BITS)
_LIMIT = float(2**62)
_QUICK_LIMIT = float(2**51)
_QUICK_WEIGHT = 2**29  # products of float32 and smaller integers are exact in float64
_ROUNDER = 1.5 * 2**52
_ROUNDER_BITS = int(np.float64(_ROUNDER).view(np.int64))
BLOCK = 32768

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
    return add_updates(partial, update[None], [weight])


def add_updates(partial: PartialSum, updates: Vector, weights: Sequence[int]) -> PartialSum:
    """Add several weighted updates, [K, P], to the same bits as one by one; quickest for K from 8 to 16.

    Raises:
      UpdateRejected: as of `add_update`, for any of them; then none of them is in the sum.
    """
    if updates.shape != (len(weights), partial.total.size):
        raise UpdateRejected(f"the update has shape {updates.shape[1:]}; the round needs {partial.total.shape}")
    scales = [float(weight * _SCALE) for weight in weights]
    norms = _add_at_once(partial.total, updates, scales)
    largest = max(map(operator.mul, norms, scales), default=0.0)
    magnitude = partial.magnitude + sum(map(operator.mul, norms, scales))
    sound = math.isfinite(magnitude) and magnitude < _LIMIT
    if not sound or largest >= _QUICK_LIMIT or max(weights, default=0) >= _QUICK_WEIGHT:
        _add_at_once(partial.total, updates, scales, take_back=True)  # integers: nothing of it is left
        if not sound:
            raise UpdateRejected(
                "the update holds values that are not finite or too large to be summed; nothing of it was used"
            )
        for update, scale in zip(updates, scales, strict=True):
            np.add(partial.total, np.rint(update.astype(np.float64) * scale).astype(np.int64), out=partial.total)
    return PartialSum(partial.total, partial.weight + sum(weights), partial.num_updates + len(weights), magnitude)


def _add_at_once(total: IntVector, updates: Vector, scales: Sequence[float], take_back: bool = False) -> list[float]:
    """Add rounded scale * update for each of K updates to `total`, and return their Euclidean norms.

    A float64 of 2**52 or more has no bits for fractions, so adding _ROUNDER rounds, and leaves the integer in the
    low bits. Right where each |scale * x| < 2**51 and each product is exact; elsewhere the caller takes it back.
    Blocks that the processor's cache holds, and no new memory, make most of the speed.
    """
    rounded = np.empty(min(BLOCK, total.size))
    add = np.subtract if take_back else np.add
    # What the rounders themselves add up to in a 64-bit register.
    offset = np.int64((len(scales) * _ROUNDER_BITS + 2**63) % 2**64 - 2**63)
    squares = [0.0] * len(scales)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what overflows
        for start in range(0, total.size, BLOCK):
            part = total[start : start + BLOCK]
            own = rounded[: part.size]
            for number, scale in enumerate(scales):
                block = updates[number, start : start + BLOCK]
                squares[number] += float(np.dot(block, block))
                np.copyto(own, block)
                np.multiply(own, scale, out=own)
                np.add(own, _ROUNDER, out=own)
                add(part, own.view(np.int64), out=part)
            (np.add if take_back else np.subtract)(part, offset, out=part)
    return [math.sqrt(square) if square >= 0 else math.nan for square in squares]


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
