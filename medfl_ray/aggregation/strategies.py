"""Aggregation strategies: pairs of pure functions (init, apply) over explicit state."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medfl_ray.config import AggregationConfig
from medfl_ray.errors import ConfigError
from medfl_ray.params import Vector

ServerState = Mapping[str, npt.NDArray[np.float32]]
EMA, EMA_ROUNDS = "ema", "ema_rounds"


def weights_alone(state: ServerState, weights: Vector) -> Vector:
    """Send the weights and nothing else."""
    return weights


def nothing_more(size: int) -> int:
    """Expect the change of the weights and nothing else."""
    return 0


class Strategy(NamedTuple):
    """`init(size)` gives the server's state; `apply(state, weights, mean_update)` the next state and weights.

    `send(state, weights)` is what hospitals get: the weights [P], behind them what else the strategy has to say.
    `extra(size)` is how many values an update has beyond the P of the weights' change; the mean update has them too,
    because every value of an update is weighted and summed alike.
    """

    init: Callable[[int], ServerState]
    apply: Callable[[ServerState, Vector, Vector], tuple[ServerState, Vector]]
    send: Callable[[ServerState, Vector], Vector] = weights_alone
    extra: Callable[[int], int] = nothing_more


def fedavg(config: AggregationConfig) -> Strategy:
    """Federated averaging: add the weighted mean update (McMahan et al. 2017, arXiv:1602.05629)."""
    rate = np.float32(config.server_learning_rate)

    def init(size: int) -> ServerState:
        return {}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> tuple[ServerState, Vector]:
        return state, weights + rate * mean_update

    return Strategy(init, apply)


def fedadam(config: AggregationConfig) -> Strategy:
    """Adam at the server, along the mean update (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

    Both moments are corrected for their start at zero, as in Adam itself: a private run has few rounds, and
    without the correction the first of them would hardly move. A weight whose update is always 0 never moves.
    """
    beta1, beta2 = config.server_momentum, config.server_beta2

    def init(size: int) -> ServerState:
        zeros = np.zeros(size, dtype=np.float32)
        return {"adam_mean": zeros, "adam_square": zeros.copy(), "adam_rounds": np.zeros(1, dtype=np.float32)}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> tuple[ServerState, Vector]:
        update = mean_update.astype(np.float64)
        mean = beta1 * state["adam_mean"].astype(np.float64) + (1 - beta1) * update
        square = beta2 * state["adam_square"].astype(np.float64) + (1 - beta2) * update**2
        rounds = float(state["adam_rounds"][0]) + 1
        step = (mean / (1 - beta1**rounds)) / (np.sqrt(square / (1 - beta2**rounds)) + config.server_adaptivity)
        after = weights + (config.server_learning_rate * step).astype(np.float32)
        next_state = {
            "adam_mean": mean.astype(np.float32),
            "adam_square": square.astype(np.float32),
            "adam_rounds": np.array([rounds], dtype=np.float32),
        }
        return next_state, after

    return Strategy(init, apply)


def with_moving_average(strategy: Strategy, decay: float) -> Strategy:
    """Keep a moving average of the weights beside a strategy; the rounds go on from the weights themselves.

    It only reads published weights, so that it costs no epsilon (De et al. 2022, arXiv:2204.13650).
    """

    def init(size: int) -> ServerState:
        average = {EMA: np.zeros(size, dtype=np.float32), EMA_ROUNDS: np.zeros(1, dtype=np.float32)}
        return {**strategy.init(size), **average}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> tuple[ServerState, Vector]:
        own = {name: value for name, value in state.items() if name not in (EMA, EMA_ROUNDS)}
        next_own, after = strategy.apply(own, weights, mean_update)
        rounds = float(state[EMA_ROUNDS][0]) + 1
        # The plain mean at first: no round before the first one would otherwise count.
        share = max(1 - decay, 1 / rounds)
        average = state[EMA] + np.float32(share) * (after - state[EMA])
        return {**next_own, EMA: average, EMA_ROUNDS: np.array([rounds], dtype=np.float32)}, after

    def send(state: ServerState, weights: Vector) -> Vector:
        return strategy.send({name: value for name, value in state.items() if name not in (EMA, EMA_ROUNDS)}, weights)

    return Strategy(init, apply, send, strategy.extra)


def released_weights(state: ServerState, weights: Vector) -> Vector:
    """Return what is evaluated and released: the moving average where the server keeps one, else the weights."""
    averaged = EMA in state and state[EMA_ROUNDS][0] > 0
    return np.asarray(state[EMA], dtype=np.float32) if averaged else weights


def own_strategy(config: AggregationConfig) -> Strategy:
    """Import a user's 'module:function' and return what it makes of the section.

    It sees the mean update alone, so that it costs no epsilon beyond that of the updates. Its state is an array of
    float32 per name, which the checkpoints keep.

    Raises:
      ConfigError: the function cannot be imported, or does not return a Strategy.
    """
    module, _, function = str(config.factory).partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"aggregation.factory {config.factory!r} cannot be imported ({type(error).__name__}); put the module on "
            "the PYTHONPATH of the process that coordinates"
        ) from None
    strategy = make(config)
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"aggregation.factory {config.factory!r} returned a {type(strategy).__name__}; it must return a "
            "medfl_ray.aggregation.strategies.Strategy"
        )
    return strategy


CATALOGUE: dict[str, Callable[[AggregationConfig], Strategy]] = {
    "fedavg": fedavg,
    "fedadam": fedadam,
    "flower": fedavg,  # the mean's place is taken by what Flower's strategy makes of the updates
    "custom": own_strategy,
}


def build_strategy(config: AggregationConfig) -> Strategy:
    """Return the strategy that a run's configuration names, with a moving average where it asks for one."""
    strategy = CATALOGUE[config.strategy](config)
    return with_moving_average(strategy, config.ema_decay) if config.ema_decay else strategy
