"""Adam at the server and the moving average of the weights, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np

from medfl_ray.aggregation.strategies import build_strategy, released_weights
from medfl_ray.config.aggregation import AggregationConfig


def fedadam(**fields: object) -> AggregationConfig:
    return AggregationConfig.model_validate({"strategy": "fedadam", "server_adaptivity": 1e-8, **fields})


def test_the_first_step_is_the_rate_in_the_updates_direction():
    strategy = build_strategy(fedadam(server_learning_rate=0.1))
    _, after = strategy.apply(strategy.init(3), np.zeros(3, np.float32), np.array([2.0, -0.001, 0.0], np.float32))
    assert np.allclose(after, [0.1, -0.1, 0.0], atol=1e-5)
    assert after.dtype == np.float32


def test_two_steps_by_hand():
    strategy = build_strategy(fedadam(server_learning_rate=1.0, server_momentum=0.5, server_beta2=0.5))
    state, weights = strategy.apply(strategy.init(1), np.zeros(1, np.float32), np.array([1.0], np.float32))
    _, weights = strategy.apply(state, weights, np.array([3.0], np.float32))
    # mean 0.25 + 1.5 over 0.75; square 0.25 + 4.5 over 0.75
    assert np.allclose(weights, 1 + (1.75 / 0.75) / np.sqrt(4.75 / 0.75), atol=1e-6)


def test_a_weight_that_is_never_updated_never_moves():
    strategy = build_strategy(fedadam())
    state, weights = strategy.init(2), np.array([1.25, 1.0], np.float32)
    for value in (0.5, -2.0, 1.0):
        state, weights = strategy.apply(state, weights, np.array([0.0, value], np.float32))
    assert weights[0] == np.float32(1.25)
    assert weights[1] != 1.0


def test_large_adaptivity_damps_small_updates():
    strategy = build_strategy(fedadam(server_adaptivity=1.0))
    _, after = strategy.apply(strategy.init(1), np.zeros(1, np.float32), np.array([1e-3], np.float32))
    assert after[0] < 2e-3


def test_the_average_stands_beside_the_weights_and_survives_a_checkpoint():
    strategy = build_strategy(AggregationConfig(ema_decay=0.5))
    state, weights = strategy.init(1), np.array([0.0], np.float32)
    seen = []
    for _ in range(3):
        state, weights = strategy.apply(state, weights, np.array([1.0], np.float32))
        state = {name: np.array(value.tolist(), dtype=np.float32) for name, value in state.items()}
        seen.append((weights[0], released_weights(state, weights)[0]))
    assert seen == [(1.0, 1.0), (2.0, 1.5), (3.0, 2.25)]


def test_without_an_average_the_weights_are_released():
    strategy = build_strategy(AggregationConfig())
    weights = np.array([2.0], np.float32)
    assert released_weights(strategy.init(1), weights) is weights


def test_before_the_first_round_the_weights_are_released():
    strategy = build_strategy(AggregationConfig(ema_decay=0.9))
    weights = np.array([2.0], np.float32)
    assert released_weights(strategy.init(1), weights) is weights
