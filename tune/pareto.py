"""What a search found, as points between privacy, quality and traffic: who is beaten by whom, and what to recommend.

Pure functions over finished trials; nothing here trains, reads or draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST_EPSILON = 1e-6


@dataclass(frozen=True)
class Point:
    """One trial: epsilon of its whole run and bytes moved (less is better), Dice with its interval (more is better)."""

    number: int
    epsilon: float
    dice: float
    size_bytes: float
    low: float
    high: float

    @property
    def costs(self) -> tuple[float, float, float]:
        """The three objectives, each so that less is better."""
        return self.epsilon, -self.dice, self.size_bytes


def beats(one: Point, other: Point) -> bool:
    """Say whether a point is nowhere worse than another and somewhere better."""
    pairs = list(zip(one.costs, other.costs, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats, the smallest epsilon first."""
    known = list(points)
    kept = [point for point in known if not any(beats(other, point) for other in known)]
    return tuple(sorted(kept, key=lambda point: (*point.costs, point.number)))


def balanced(points: Iterable[Point]) -> Point | None:
    """Return the point that lies nearest to the smallest epsilon and the best Dice at once; None for no points.

    Both are scaled to the range of the front in epsilon and Dice, epsilon as its logarithm. Traffic decides among
    equals only: a smaller network that does not segment is no bargain.
    """
    rising = privacy_front(points)
    if not rising:
        return None
    rows = [(math.log(max(point.epsilon, SMALLEST_EPSILON)), -point.dice) for point in rising]
    lows, highs = (
        [min(column) for column in zip(*rows, strict=True)],
        [max(column) for column in zip(*rows, strict=True)],
    )

    def distance(place: int) -> float:
        scaled = [(v - a) / (b - a) if b > a else 0.0 for v, a, b in zip(rows[place], lows, highs, strict=True)]
        return math.hypot(*scaled)

    return rising[min(range(len(rising)), key=distance)]


def cheapest(points: Iterable[Point], dice: float) -> Point | None:
    """Return the point of the smallest epsilon that reaches a Dice, the best and smallest of equals; None if none."""
    reaching = [point for point in points if point.dice >= dice]
    return min(reaching, key=lambda point: (point.epsilon, -point.dice, point.size_bytes), default=None)


def privacy_front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats in epsilon and Dice alone, epsilon and Dice rising together."""
    rising: list[Point] = []
    for point in sorted(points, key=lambda point: (point.epsilon, -point.dice, point.size_bytes)):
        if not rising or point.dice > rising[-1].dice:
            rising.append(point)
    return tuple(rising)


def epsilon_for(points: Iterable[Point], dice: float) -> float | None:
    """Return about what epsilon a Dice needs: between two trials of the front on the line through them.

    The line is drawn over the logarithm of epsilon. None where no trial reaches the Dice; the smallest trial's epsilon
    where that one does already, since nothing smaller was tried.
    """
    rising = privacy_front(points)
    above = next((place for place, point in enumerate(rising) if point.dice >= dice), None)
    if above is None:
        return None
    upper = rising[above]
    if above == 0 or upper.dice == dice:
        return upper.epsilon
    lower = rising[above - 1]
    if lower.epsilon <= 0:
        return upper.epsilon
    part = (dice - lower.dice) / (upper.dice - lower.dice)
    between = math.exp(math.log(lower.epsilon) + part * (math.log(upper.epsilon) - math.log(lower.epsilon)))
    return min(max(between, lower.epsilon), upper.epsilon)
