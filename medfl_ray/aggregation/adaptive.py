"""Server optimizers: the mean update as a pseudo-gradient (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

Everything is computed in float64; the state is kept as float32. A weight whose update is always 0 never moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.interface import Next, ServerState, Strategy
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.params import Vector

Wide = npt.NDArray[np.float64]
Correction = Literal["adam", "none", "flower"]


def fedavgm(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Momentum at the server: v <- beta v + update, weights + rate v (Hsu et al. 2019, arXiv:1909.06335)."""

    def init(size: int) -> ServerState:
        return {"momentum": np.zeros(size, dtype=np.float32)}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        momentum = config.server_momentum * state["momentum"].astype(np.float64) + mean_update
        after = weights + (config.server_learning_rate * momentum).astype(np.float32)
        return {"momentum": momentum.astype(np.float32)}, after

    return Strategy(init, apply)


def fedadam(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Adam at the server.

    By default both moments of FedAdam and FedYogi are corrected for their start at zero, as in Adam itself: a private
    run has few rounds, and without the correction the first of them would hardly move. `bias_correction: none` is the
    paper's algorithm started from zero, and `flower` what Flower 1.42 computes: FedAdam's step times
    sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) in round t, FedYogi's uncorrected.
    """
    beta2 = config.server_beta2

    def second_moment(before: Wide, squared: Wide) -> Wide:
        return beta2 * before + (1 - beta2) * squared

    return _adaptive(config, config.server_momentum, second_moment, config.bias_correction)


def fedyogi(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Yogi at the server: the second moment moves by a step of fixed size; see `fedadam` for the corrections."""
    beta2 = config.server_beta2

    def second_moment(before: Wide, squared: Wide) -> Wide:
        after: Wide = before - (1 - beta2) * squared * np.sign(before - squared)
        return after

    correction: Correction = "none" if config.bias_correction == "flower" else config.bias_correction
    return _adaptive(config, config.server_momentum, second_moment, correction)


def fedadagrad(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Adagrad at the server: the second moment is a sum, and there is no momentum."""

    def second_moment(before: Wide, squared: Wide) -> Wide:
        return before + squared

    return _adaptive(config, 0.0, second_moment, "none")


def _adaptive(
    config: AggregationConfig, beta1: float, second_moment: Callable[[Wide, Wide], Wide], correction: Correction
) -> Strategy:
    """Step along the first moment over the root of the second, both of the mean update."""

    def init(size: int) -> ServerState:
        zeros = np.zeros(size, dtype=np.float32)
        return {"adam_mean": zeros, "adam_square": zeros.copy(), "adam_rounds": np.zeros(1, dtype=np.float32)}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        update = mean_update.astype(np.float64)
        mean = beta1 * state["adam_mean"].astype(np.float64) + (1 - beta1) * update
        square = second_moment(state["adam_square"].astype(np.float64), update**2)
        rounds = float(state["adam_rounds"][0]) + 1
        step = _step(config, correction, mean, square, rounds)
        next_state = {
            "adam_mean": mean.astype(np.float32),
            "adam_square": square.astype(np.float32),
            "adam_rounds": np.array([rounds], dtype=np.float32),
        }
        return next_state, weights + (config.server_learning_rate * step).astype(np.float32)

    return Strategy(init, apply)


def _step(config: AggregationConfig, correction: Correction, mean: Wide, square: Wide, rounds: float) -> Wide:
    """Return the step of round `rounds`, counted from 1, before the server's learning rate."""
    beta1, beta2, tau = config.server_momentum, config.server_beta2, config.server_adaptivity
    if correction == "adam":
        mean, square = mean / (1 - beta1**rounds), square / (1 - beta2**rounds)
    factor = 1.0
    if correction == "flower":
        factor = float(np.sqrt(1 - beta2 ** (rounds + 1)) / (1 - beta1 ** (rounds + 1)))
    step: Wide = factor * mean / (np.sqrt(square) + tau)
    return step
