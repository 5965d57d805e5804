"""Strategies that care for the worst hospital.

What hospitals do for them is in medfl_ray/training/rules/client_rules.py. Shapes: P values of the weights, N hospitals.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.interface import Next, ServerState, Strategy, no_state
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.params import Vector

HOSPITAL_WEIGHTS = "afl_weights"
SMALLEST_SUM = 1e-12


def qfedavg(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """q-FedAvg: hospitals of a higher loss F weigh F^q more (Li et al. 2020, arXiv:1905.10497, algorithm 2).

    An update is (F^q change, F^q + q F^(q-1) L |change|^2), both sides of the paper's quotient divided by its
    Lipschitz constant L = 1 / learning rate, so that they stay in the range of the change itself.
    """
    rate = config.server_learning_rate

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        total = max(float(mean_update[-1]), SMALLEST_SUM)
        return state, weights + np.float32(rate / total) * mean_update[:-1]

    return Strategy(no_state, apply, extra=lambda size: 1)


def afl(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Agnostic federated learning: the weights of the hospitals climb where losses are high (Mohri et al. 2019,
    arXiv:1902.00146).

    Sent is (weights, lambda [N]); an update of hospital i is (N lambda_i change, its loss at place i of [N] zeros),
    all weighted alike. The step is the mean under lambda of those who took part, whose losses say who they are.
    """
    rate, step = np.float32(config.server_learning_rate), config.fairness_rate

    def init(size: int) -> ServerState:
        return {HOSPITAL_WEIGHTS: np.full(num_hospitals, 1 / num_hospitals, dtype=np.float32)}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        change, losses = mean_update[:-num_hospitals], mean_update[-num_hospitals:].astype(np.float64)
        took_part, before = losses != 0, state[HOSPITAL_WEIGHTS].astype(np.float64)
        # The mean has N lambda_i / n before every change; lambda_i over their sum is wanted.
        scale = took_part.sum() / (num_hospitals * max(float(before[took_part].sum()), SMALLEST_SUM))
        climbed = before + step * num_hospitals * losses
        return {HOSPITAL_WEIGHTS: onto_simplex(climbed).astype(np.float32)}, weights + np.float32(rate * scale) * change

    def send(state: ServerState, weights: Vector) -> Vector:
        return np.concatenate([weights, state[HOSPITAL_WEIGHTS]])

    return Strategy(init, apply, send, extra=lambda size: num_hospitals)


def onto_simplex(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the nearest weights >= 0 of sum 1, [N] (Duchi et al. 2008)."""
    falling = np.sort(values)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(values) + 1)
    last = np.flatnonzero(falling > excess)[-1]
    nearest: npt.NDArray[np.float64] = np.maximum(values - excess[last], 0.0)
    return nearest
