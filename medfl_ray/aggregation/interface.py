"""What a strategy is: pure functions over explicit state, so that a run goes on from its checkpoint.

Shapes: P values of the weights, E further values of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medfl_ray.params import Vector

ServerState = Mapping[str, npt.NDArray[np.float32]]
Next = tuple[ServerState, Vector]
"""The next state and the next weights [P]."""


def weights_alone(state: ServerState, weights: Vector) -> Vector:
    """Send the weights and nothing else."""
    return weights


def nothing_more(size: int) -> int:
    """Expect the change of the weights and nothing else."""
    return 0


class Strategy(NamedTuple):
    """`init(size)` gives the server's state; `apply(state, weights, mean_update)` the next state and weights.

    `send(state, weights)` is what hospitals get: the weights [P], behind them what else the strategy has to say.
    `extra(size)` is how many values E an update has beyond the P of the weights' change; the mean update has them too,
    because every value of an update is weighted and summed alike. `apply_part`, where it is there, takes the place of
    `apply` and is also given the share of all hospitals' weight that the updates have.
    """

    init: Callable[[int], ServerState]
    apply: Callable[[ServerState, Vector, Vector], Next]
    send: Callable[[ServerState, Vector], Vector] = weights_alone
    extra: Callable[[int], int] = nothing_more
    apply_part: Callable[[ServerState, Vector, Vector, float], Next] | None = None

    def step(self, state: ServerState, weights: Vector, mean_update: Vector, share: float) -> Next:
        """Return the next state and weights, by `apply_part` where there is one."""
        if self.apply_part is not None:
            return self.apply_part(state, weights, mean_update, share)
        return self.apply(state, weights, mean_update)


def of_part(
    init: Callable[[int], ServerState],
    apply_part: Callable[[ServerState, Vector, Vector, float], Next],
    send: Callable[[ServerState, Vector], Vector] = weights_alone,
    extra: Callable[[int], int] = nothing_more,
) -> Strategy:
    """Return a strategy that has to know how many took part; its `apply` is for all of them."""

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        return apply_part(state, weights, mean_update, 1.0)

    return Strategy(init, apply, send, extra, apply_part)


def no_state(size: int) -> ServerState:
    """Keep nothing at the server but the weights."""
    return {}
