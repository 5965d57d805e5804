"""Strategies as (init, apply) over explicit state."""

import numpy as np

from medfl_ray.aggregation.strategies import build_strategy
from medfl_ray.config.aggregation import AggregationConfig


def test_fedavg_adds_the_mean_update_times_the_server_rate():
    strategy = build_strategy(AggregationConfig(server_learning_rate=0.5))
    weights = np.array([1.0, 2.0], np.float32)
    state, after = strategy.apply(strategy.init(2), weights, np.array([2.0, -4.0], np.float32))
    assert after.tolist() == [2.0, 0.0]
    assert after.dtype == np.float32
    assert state == {}
    assert weights.tolist() == [1.0, 2.0]
