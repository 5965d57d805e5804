"""Which hospitals train together: neighbours in size, so that little of a group's work is padding.

A group runs as many steps as its longest member needs, each as wide as its largest batch. Plain numbers alone, so
that whoever deals the groups needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence

GROUP_SIZES = (1, 2, 4, 8, 12, 16)
PIECES_PER_ACTOR = 16
MAX_GROUPS = 16
"""In one piece of work, so that a round of ten thousand hospitals is heard of while it lasts."""
STEP_COST = 8
"""Calls of one step take about as long as this many samples of 32 x 32 voxels; larger samples leave less to gain."""


def form_groups(sizes: Sequence[tuple[int, int]], group_size: int, batch_size: int) -> list[list[int]]:
    """Divide hospitals into groups of at most `group_size` with the least work, the smallest hospitals first.

    The hospitals are sorted by (steps, patients) and cut where that saves most: a few smaller groups cost less than
    one in which many wait for the longest. Equal hospitals keep their order. Groups have few different sizes, for a
    convolution of a new shape is prepared at length when it first comes.

    Args:
      sizes: steps of the round and number of patients of each hospital.

    Returns: positions in `sizes`, every one once.
    """
    order = sorted(range(len(sizes)), key=lambda position: sizes[position])
    allowed = sorted({size for size in GROUP_SIZES if size < group_size} | {group_size})
    least, cuts = [0.0], [0]
    for end in range(1, len(order) + 1):
        fixed, each = _costs(sizes[order[end - 1]], batch_size)
        cost, size = min((least[end - size] + float(fixed + each * size), size) for size in allowed if size <= end)
        least.append(cost)
        cuts.append(end - size)
    groups, end = [], len(order)
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]


def cut_into_pieces(costs: Sequence[float], num_actors: int, evenly: bool) -> list[tuple[int, int]]:
    """Cut groups, the costliest first, into pieces of work: (first, last + 1) of each.

    A piece costs messages and the storage of a sum, and the last pieces say how long one actor waits for another. So
    the first are large, and of what is left each of several actors takes two thirds of its share, down to one group.

    Args:
      evenly: pieces of as many groups each instead, a sixteenth of an actor's share.
    """
    if evenly:
        count = max(1, -(-len(costs) // (PIECES_PER_ACTOR * num_actors)))
        return [(start, min(start + count, len(costs))) for start in range(0, len(costs), count)]
    pieces, start, left = [], 0, sum(costs)
    while start < len(costs):
        taken, end = costs[start], start + 1
        most = left if num_actors == 1 else left * 2 / (3 * num_actors)
        while end < min(start + MAX_GROUPS, len(costs)) and taken + costs[end] <= most:
            taken += costs[end]
            end += 1
        pieces.append((start, end))
        start, left = end, left - taken
    return pieces


def group_cost(longest: tuple[int, int], count: int, batch_size: int) -> float:
    """Return what a group costs, in samples: of `count` hospitals, the longest with these steps and patients."""
    fixed, each = _costs(longest, batch_size)
    return float(fixed + each * count)


def _costs(longest: tuple[int, int], batch_size: int) -> tuple[int, int]:
    """Return what a group costs however few it has, and what each hospital adds: how many patients it sees at most."""
    steps, patients = longest
    passes, rest = divmod(steps, max(1, -(-patients // batch_size)))  # the last batch of a pass may be short
    return STEP_COST * steps, min(steps * batch_size, passes * patients + rest * batch_size)
