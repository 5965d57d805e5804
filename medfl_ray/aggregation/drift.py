"""Strategies against the drift of hospitals with different data or different amounts of work.

What hospitals do for them is in medfl_ray/training/rules/client_rules.py. Shapes: P values of the weights.
"""

from __future__ import annotations

import numpy as np

from medfl_ray.aggregation.interface import Next, ServerState, Strategy, no_state, of_part
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.params import Vector

CONTROL, DYNAMIC = "scaffold_control", "feddyn_state"


def fednova(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Normalised averaging: hospitals that do more steps pull no harder (Wang et al. 2020, arXiv:2007.07481).

    An update is (change / a, a) with the hospital's accumulated steps a; the mean normalised change is scaled by the
    mean of a.
    """
    rate = config.server_learning_rate

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        change, steps = mean_update[:-1], float(mean_update[-1])
        return state, weights + np.float32(rate * steps) * change

    return Strategy(no_state, apply, extra=lambda size: 1)


def scaffold(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Control variates: c, the mean of the hospitals' own c_i, corrects every step (Karimireddy et al. 2020,
    arXiv:1910.06378).

    Sent is (weights, c); an update is (change of the weights, change of c_i). Weighted like the weights, c stays the
    weighted mean of all c_i: those who did not take part have not changed theirs.
    """
    rate = np.float32(config.server_learning_rate)

    def init(size: int) -> ServerState:
        return {CONTROL: np.zeros(size, dtype=np.float32)}

    def apply_part(state: ServerState, weights: Vector, mean_update: Vector, share: float) -> Next:
        change, control_change = np.split(mean_update, 2)
        control = state[CONTROL] + np.float32(share) * control_change
        return {CONTROL: control}, weights + rate * change

    def send(state: ServerState, weights: Vector) -> Vector:
        return np.concatenate([weights, state[CONTROL]])

    return of_part(init, apply_part, send, extra=lambda size: size)


def feddyn(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """Dynamic regularisation: local optima are moved until they agree (Acar et al. 2021, arXiv:2111.04263).

    h <- h - alpha share mean_change, weights <- weights + mean_change - h / alpha.
    """
    alpha = config.dynamic_alpha

    def init(size: int) -> ServerState:
        return {DYNAMIC: np.zeros(size, dtype=np.float32)}

    def apply_part(state: ServerState, weights: Vector, mean_update: Vector, share: float) -> Next:
        change = mean_update.astype(np.float64)
        dynamic = state[DYNAMIC].astype(np.float64) - alpha * share * change
        after = weights + (change - dynamic / alpha).astype(np.float32)
        return {DYNAMIC: dynamic.astype(np.float32)}, after

    return of_part(init, apply_part)
