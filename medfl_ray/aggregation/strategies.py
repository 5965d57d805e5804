"""Aggregation strategies: pairs of pure functions (init, apply) over explicit state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medfl_ray.aggregation.adaptive import fedadagrad, fedadam, fedavgm, fedyogi
from medfl_ray.aggregation.drift import feddyn, fednova, scaffold
from medfl_ray.aggregation.fairness import afl, qfedavg
from medfl_ray.aggregation.interface import Next, ServerState, Strategy, no_state, of_part
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.errors import ConfigError
from medfl_ray.named_code import named_function
from medfl_ray.params import Vector

__all__ = ["EMA", "SERVER_STRATEGIES", "ServerState", "Strategy", "build_strategy", "released_weights"]

EMA, EMA_ROUNDS = "ema", "ema_rounds"


def fedavg(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Federated averaging: add the weighted mean update (McMahan et al. 2017, arXiv:1602.05629)."""
    rate = np.float32(config.server_learning_rate)

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        return state, weights + rate * mean_update

    return Strategy(no_state, apply)


def with_moving_average(strategy: Strategy, decay: float) -> Strategy:
    """Keep a moving average of the weights beside a strategy; the rounds go on from the weights themselves.

    It only reads published weights, so that it costs no epsilon (De et al. 2022, arXiv:2204.13650).
    """

    def own_part(state: ServerState) -> ServerState:
        return {name: value for name, value in state.items() if name not in (EMA, EMA_ROUNDS)}

    def init(size: int) -> ServerState:
        average = {EMA: np.zeros(size, dtype=np.float32), EMA_ROUNDS: np.zeros(1, dtype=np.float32)}
        return {**strategy.init(size), **average}

    def apply_part(state: ServerState, weights: Vector, mean_update: Vector, share: float) -> Next:
        next_own, after = strategy.step(own_part(state), weights, mean_update, share)
        rounds = float(state[EMA_ROUNDS][0]) + 1
        # The plain mean at first: no round before the first one would otherwise count.
        part = max(1 - decay, 1 / rounds)
        average = state[EMA] + np.float32(part) * (after - state[EMA])
        return {**next_own, EMA: average, EMA_ROUNDS: np.array([rounds], dtype=np.float32)}, after

    def send(state: ServerState, weights: Vector) -> Vector:
        return strategy.send(own_part(state), weights)

    return of_part(init, apply_part, send, strategy.extra)


def released_weights(state: ServerState, weights: Vector) -> Vector:
    """Return what is evaluated and released: the moving average where the server keeps one, else the weights."""
    averaged = EMA in state and state[EMA_ROUNDS][0] > 0
    return np.asarray(state[EMA], dtype=np.float32) if averaged else weights


def own_strategy(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Import a user's 'module:function' and return what it makes of the section.

    It sees the mean update alone, so that it costs no epsilon beyond that of the updates. Its state is an array of
    float32 per name, which the checkpoints keep.

    Raises:
      ConfigError: the function cannot be imported, or does not return a Strategy.
    """
    remedy = "put the module on the PYTHONPATH of the process that coordinates"
    make = named_function(str(config.factory), "aggregation.factory", remedy)
    strategy = make(config)
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"aggregation.factory {config.factory!r} returned a {type(strategy).__name__}; it must return a "
            "medfl_ray.aggregation.strategies.Strategy"
        )
    return strategy


SERVER_STRATEGIES: dict[str, Callable[[AggregationConfig, int], Strategy]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "fednova": fednova,
    "qfedavg": qfedavg,
    "afl": afl,
    "fedprox": fedavg,
    "scaffold": scaffold,
    "feddyn": feddyn,
    "fedbn": fedavg,
    "silobn": fedavg,
    "fedper": fedavg,
    "fedrep": fedavg,
    "ditto": fedavg,
    "apfl": fedavg,
    "flower": fedavg,
    "custom": own_strategy,
}
"""What the server does in each strategy, from the configuration and the number of hospitals of the whole run.

Where it is `fedavg` under another name, the hospitals, or a rule over all updates, do what differs.
"""


def build_strategy(config: AggregationConfig, num_hospitals: int = 1) -> Strategy:
    """Return the strategy that a run's configuration names, with a moving average where it asks for one.

    Args:
      num_hospitals: of the whole run, whether they are there or not; afl gives each a weight.
    """
    strategy = SERVER_STRATEGIES[config.strategy](config, num_hospitals)
    return with_moving_average(strategy, config.ema_decay) if config.ema_decay else strategy
