"""Order-independent sums of update vectors.

Floating-point addition depends on its order, and the order in which hospitals answer is chance. Each
update is therefore rounded once, downward to a multiple of 2**-FRACTION_BITS, and summed with its whole
number of a weight in int64, which is exact and associative: the same bits whatever the number of actors,
whichever came first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.directed_rounding import rounding_down
from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector, norm

FRACTION_BITS = 36
_SCALE = float(2**FRACTION_BITS)
_LIMIT = float(2**62)
_GROUND = np.float64(1.5 * 2.0 ** (52 - FRACTION_BITS))
"""Floats from two to four thirds of it, and no others, have just FRACTION_BITS bits behind the point."""
_GROUND_BITS = int(_GROUND.view(np.int64))
_ROOM = 0.99 * 2.0 ** (51 - FRACTION_BITS)
"""How far from _GROUND a sum may go, less what the norms that say so may be off."""
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
    """Add several weighted updates, [K, P], to the same bits as one by one; quickest for 8 to 16 of equal weight.

    Raises:
      UpdateRejected: as of `add_update`, for any of them; then none of them is in the sum.
      ValueError, TypeError: a weight is negative, or no whole number.
    """
    weights = [operator.index(weight) for weight in weights]  # of any size: sums of NumPy's integers would wrap around
    if min(weights, default=0) < 0:
        raise ValueError(f"an update weighs {min(weights)}; a weight counts patients, from 0 on")
    if updates.shape != (len(weights), partial.total.size):
        raise UpdateRejected(f"the update has shape {updates.shape[1:]}; the round needs {partial.total.shape}")
    with rounding_down() as can_be_quick:
        if can_be_quick:
            norms, fits = _add_at_once(partial.total, updates, weights)
        else:
            norms, fits = [norm(update) for update in updates], False
        magnitude = partial.magnitude + sum(map(operator.mul, norms, weights)) * _SCALE
        sound = math.isfinite(magnitude) and magnitude < _LIMIT
        if can_be_quick and not (sound and fits):
            _add_at_once(partial.total, updates, weights, take_back=True)  # integers: nothing of it is left
    if not sound:
        raise UpdateRejected(
            "the update holds values that are not finite or too large to be summed; nothing of it was used"
        )
    if not fits:
        for update, weight in zip(updates, weights, strict=True):
            np.add(partial.total, np.floor(update.astype(np.float64) * _SCALE).astype(np.int64) * weight, partial.total)
    return PartialSum(partial.total, partial.weight + sum(weights), partial.num_updates + len(weights), magnitude)


def _add_at_once(
    total: IntVector, updates: Vector, weights: Sequence[int], take_back: bool = False
) -> tuple[list[float], bool]:
    """Add weight * rounded update to `total` for each of K; return their Euclidean norms, and whether it is right.

    Sums start at _GROUND, around which a float64 has bits down to 2**-FRACTION_BITS and none below, so that an
    addition that rounds downward rounds what is added; the low bits are then the sum as an integer. Right where no
    sum leaves that range, which the norms bound; elsewhere the caller takes it back. Updates of one weight share their
    sums. Blocks that the processor's cache holds, and no new memory, make most of the speed.
    """
    sums = np.empty(min(BLOCK, total.size))
    order = sorted(range(len(weights)), key=weights.__getitem__)
    squares, fits = [0.0] * len(weights), True
    move = np.subtract if take_back else np.add
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what overflows
        for start in range(0, total.size if order else 0, BLOCK):
            part = total[start : start + BLOCK]
            own = sums[: part.size]
            integers = own.view(np.int64)
            room, weight, grounds = 0.0, 0, 0
            for number in order:
                block = updates[number, start : start + BLOCK]
                square = float(np.dot(block, block))
                squares[number] += square
                bound = math.sqrt(square)
                if weights[number] == weight and bound < room:
                    np.add(own, block, out=own, dtype=np.float64)
                else:
                    if grounds:
                        move(part, np.multiply(integers, weight, out=integers), out=part)
                    room, weight = _ROOM, weights[number]
                    grounds += weight
                    np.add(block, _GROUND, out=own, dtype=np.float64)
                room -= bound
                fits = fits and room > 0
            move(part, np.multiply(integers, weight, out=integers), out=part)
            offset = _wrapped(grounds * _GROUND_BITS)
            (np.add if take_back else np.subtract)(part, offset, out=part)
    return [math.sqrt(square) for square in squares], fits


def _wrapped(integer: int) -> np.int64:
    """Return what a 64-bit register keeps of an integer."""
    return np.int64((integer + 2**63) % 2**64 - 2**63)


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
