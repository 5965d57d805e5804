"""Shapley values of hospitals by truncated Monte Carlo; it knows nothing of training, only values of coalitions."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Coalition = frozenset[str]
Values = Callable[[Sequence[Coalition]], Mapping[Coalition, float]]
"""Returns the value of each coalition asked for; those of one call may be computed at the same time."""


@dataclass(frozen=True)
class Shapley:
    """Mean marginal contribution of each player; standard errors are None where every order was used."""

    values: dict[str, float]
    standard_errors: dict[str, float | None]
    num_orders: int
    all_orders: bool
    num_truncated: int


def shapley_values(players: Sequence[str], values: Values, num_orders: int, truncation: float, seed: int) -> Shapley:
    """Estimate Shapley values from orders of the players, all of them where there are no more than `num_orders`.

    All orders are walked at the same time, so that one call of `values` has the coalitions of one size of all orders.
    An order ends where its value is within `truncation` of that of all players: what follows adds 0.

    Source: Ghorbani and Zou 2019, Data Shapley, arXiv:1904.02868, algorithm 1.
    """
    orders, complete = draw_orders(sorted(players), num_orders, seed)
    everyone: Coalition = frozenset(players)
    known = dict(values([frozenset(), everyone]))
    reached = [known[frozenset()]] * len(orders)
    gains: list[dict[str, float]] = [dict.fromkeys(players, 0.0) for _ in orders]
    going, truncated = set(range(len(orders))), 0
    for size in range(1, len(players) + 1):
        near = {o for o in going if truncation > 0 and abs(known[everyone] - reached[o]) <= truncation}
        going, truncated = going - near, truncated + len(near)
        wanted = {frozenset(orders[o][:size]) for o in going} - set(known)
        if wanted:
            known.update(values(sorted(wanted, key=sorted)))
        for o in going:
            value = known[frozenset(orders[o][:size])]
            gains[o][orders[o][size - 1]] = value - reached[o]
            reached[o] = value
    columns = {player: [gain[player] for gain in gains] for player in players}
    return Shapley(
        values={player: statistics.fmean(column) for player, column in columns.items()},
        standard_errors={player: None if complete else _standard_error(column) for player, column in columns.items()},
        num_orders=len(orders),
        all_orders=complete,
        num_truncated=truncated,
    )


def draw_orders(players: Sequence[str], count: int, seed: int) -> tuple[list[tuple[str, ...]], bool]:
    """Return all orders and True where there are at most `count`, else as many random ones and False."""
    if math.factorial(len(players)) <= count:
        return list(itertools.permutations(players)), True
    rng = np.random.default_rng(np.random.SeedSequence([abs(seed), 0x54A9]))
    return [tuple(players[i] for i in rng.permutation(len(players))) for _ in range(count)], False


def _standard_error(column: Sequence[float]) -> float | None:
    """Return the standard error of the mean; of one order there is none."""
    return statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else None
