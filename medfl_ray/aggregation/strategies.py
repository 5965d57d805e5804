"""Aggregation strategies: pairs of pure functions (init, apply) over explicit state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medfl_ray.config import AggregationConfig
from medfl_ray.params import Vector

ServerState = Mapping[str, npt.NDArray[np.float32]]


class Strategy(NamedTuple):
    """`init(size)` gives the server's state; `apply(state, weights, mean_update)` the next state and weights."""

    init: Callable[[int], ServerState]
    apply: Callable[[ServerState, Vector, Vector], tuple[ServerState, Vector]]


def fedavg(config: AggregationConfig) -> Strategy:
    """Federated averaging: add the weighted mean update (McMahan et al. 2017, arXiv:1602.05629)."""
    rate = np.float32(config.server_learning_rate)

    def init(size: int) -> ServerState:
        return {}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> tuple[ServerState, Vector]:
        return state, weights + rate * mean_update

    return Strategy(init, apply)


CATALOGUE: dict[str, Callable[[AggregationConfig], Strategy]] = {"fedavg": fedavg}


def build_strategy(config: AggregationConfig) -> Strategy:
    """Return the strategy that a run's configuration names."""
    return CATALOGUE[config.strategy](config)
