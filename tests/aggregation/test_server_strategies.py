"""Every server strategy against numbers worked out by hand, and the server optimizers against Flower's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flwr.app import ArrayRecord, Metadata, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common import Array
from flwr.serverapp import strategy as flower

from medfl_ray.aggregation.fairness import onto_simplex
from medfl_ray.aggregation.strategies import build_strategy
from medfl_ray.config.aggregation import AggregationConfig


def strategy_of(name: str, num_hospitals: int = 1, **fields: object):
    return build_strategy(AggregationConfig.model_validate({"strategy": name, **fields}), num_hospitals)


def vector(*values: float):
    return np.array(values, dtype=np.float32)


def test_momentum_by_hand():
    strategy = strategy_of("fedavgm", server_momentum=0.5, server_learning_rate=2.0)
    state, weights = strategy.apply(strategy.init(1), vector(1), vector(1))
    assert weights.tolist() == [3.0]
    _, weights = strategy.apply(state, weights, vector(3))
    assert weights.tolist() == [3.0 + 2 * (0.5 * 1 + 3)]


def test_yogi_by_hand():
    fields = {"server_momentum": 0.5, "server_beta2": 0.5, "server_adaptivity": 1.0, "bias_correction": "none"}
    strategy = strategy_of("fedyogi", **fields)
    state, weights = strategy.apply(strategy.init(1), vector(0), vector(2))
    # mean 1; square 0 - 0.5 * 4 * sign(0 - 4) = 2
    assert np.allclose(weights, 1 / (np.sqrt(2) + 1))
    _, after = strategy.apply(state, weights, vector(1))
    # mean 1; square 2 - 0.5 * 1 * sign(2 - 1) = 1.5
    assert np.allclose(after - weights, 1 / (np.sqrt(1.5) + 1))


def test_adagrad_by_hand():
    strategy = strategy_of("fedadagrad", server_adaptivity=1.0)
    state, weights = strategy.apply(strategy.init(1), vector(0), vector(3))
    assert np.allclose(weights, 3 / 4)
    _, after = strategy.apply(state, weights, vector(4))
    assert np.allclose(after - weights, 4 / 6)


def test_fednova_scales_the_mean_normalised_change_by_the_mean_steps():
    # Two hospitals of equal weight: change 2 in 2 steps, change 12 in 4 steps: (1 + 3) / 2 times (2 + 4) / 2.
    strategy = strategy_of("fednova")
    assert strategy.extra(1) == 1
    _, after = strategy.apply({}, vector(1), (vector(1, 2) + vector(3, 4)) / 2)
    assert after.tolist() == [7.0]


def test_fednova_equals_fedavg_where_all_do_as_many_steps():
    changes, steps = [vector(2), vector(12)], 4.0
    _, after = strategy_of("fednova").apply({}, vector(1), sum(np.append(c / steps, steps) for c in changes) / 2)
    assert np.allclose(after, 1 + 7)


def test_scaffold_sends_its_control_and_moves_it_by_the_share_that_took_part():
    strategy = strategy_of("scaffold", server_learning_rate=0.5)
    state = strategy.init(2)
    assert strategy.send(state, vector(1, 2)).tolist() == [1, 2, 0, 0]
    assert strategy.extra(2) == 2
    state, weights = strategy.step(state, vector(1, 2), vector(2, 4, 8, 16), 0.25)
    assert weights.tolist() == [2.0, 4.0]
    assert strategy.send(state, weights).tolist() == [2, 4, 2, 4]


def test_feddyn_by_hand():
    strategy = strategy_of("feddyn", dynamic_alpha=0.5)
    state, weights = strategy.step(strategy.init(1), vector(1), vector(2), 0.5)
    # h = -0.5 * 0.5 * 2 = -0.5; weights 1 + 2 + 0.5 / 0.5
    assert weights.tolist() == [4.0]
    _, weights = strategy.step(state, weights, vector(0), 1.0)
    assert weights.tolist() == [5.0]


def test_qfedavg_by_hand():
    # q 1, L 10, losses 1 and 3, changes 1 and -1: (1 - 3) / (1 + 10 + 3 + 10)
    updates = [vector(1, 1 + 10), vector(-3, 3 + 10)]
    _, after = strategy_of("qfedavg").apply({}, vector(1), sum(updates) / 2)
    assert np.allclose(after, 1 - 2 / 24)


def test_afl_moves_weight_to_the_hospital_with_the_higher_loss():
    strategy = strategy_of("afl", num_hospitals=2, fairness_rate=0.1)
    state = strategy.init(1)
    assert strategy.send(state, vector(3)).tolist() == [3, 0.5, 0.5]
    # Hospital 0: loss 1, change 1; hospital 1: loss 3, change -1; each times N lambda = 1.
    state, weights = strategy.apply(state, vector(3), (vector(1, 1, 0) + vector(-1, 0, 3)) / 2)
    assert weights.tolist() == [3.0]
    # 0.5 + 0.1 * (1, 3) = (0.6, 0.8), less 0.2 each on the simplex
    assert np.allclose(strategy.send(state, weights)[1:], [0.4, 0.6])


def test_afl_steps_as_far_when_hospitals_are_absent():
    strategy = strategy_of("afl", num_hospitals=4)
    # Of four hospitals two took part, with changes 1 and 3, each times N lambda = 1.
    _, weights = strategy.apply(strategy.init(1), vector(0), (vector(1, 1, 0, 0, 0) + vector(3, 0, 2, 0, 0)) / 2)
    assert weights.tolist() == [2.0]


@pytest.mark.parametrize(
    ("values", "nearest"),
    [([0.2, 0.8], [0.2, 0.8]), ([2.0, 0.0, 0.0], [1, 0, 0]), ([0.5, 0.5, -3.0], [0.5, 0.5, 0]), ([3, 3], [0.5, 0.5])],
)
def test_nearest_point_of_the_simplex(values: list[float], nearest: list[float]):
    assert np.allclose(onto_simplex(np.array(values, dtype=np.float64)), nearest)


def test_afl_finds_its_own_weights():
    assert AggregationConfig(strategy="afl").weighting == "uniform"
    with pytest.raises(ValueError, match=r"leave aggregation\.weighting out"):
        AggregationConfig(strategy="afl", weighting="patients")


def test_the_moving_average_goes_with_a_strategy_that_sends_more():
    plain, averaged = strategy_of("scaffold"), strategy_of("scaffold", ema_decay=0.5)
    first, second = plain.init(1), averaged.init(1)
    for share in (1.0, 0.5):
        first, weights = plain.step(first, vector(1), vector(2, 3), share)
        second, same = averaged.step(second, vector(1), vector(2, 3), share)
        assert np.array_equal(weights, same)
        assert np.array_equal(plain.send(first, weights), averaged.send(second, same))
    assert averaged.extra(1) == 1


OPTIMIZERS = {
    "fedavgm": lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "fedadam": lambda: flower.FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-2),
    "fedyogi": lambda: flower.FedYogi(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-2),
    "fedadagrad": lambda: flower.FedAdagrad(eta=0.05, tau=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_flower_on_random_updates(name: str):
    rng, size = np.random.default_rng(3), 500
    rate = 0.7 if name == "fedavgm" else 0.05
    fields = {"server_learning_rate": rate, "server_adaptivity": 1e-2, "bias_correction": "flower"}
    ours, theirs = strategy_of(name, **fields), OPTIMIZERS[name]()
    weights = rng.normal(size=size).astype(np.float32)
    state, flowers = ours.init(size), weights.astype(np.float64)
    for number in range(1, 6):
        updates, counts = rng.normal(0, 0.1, (3, size)).astype(np.float32), [3, 5, 11]
        mean = np.average(updates, axis=0, weights=counts).astype(np.float32)
        state, weights = ours.step(state, weights, mean, 1.0)
        flowers = flower_round(theirs, number, flowers, updates, counts)
        assert np.abs(weights - flowers).max() <= 1e-6


def flower_round(strategy, number: int, weights, updates, counts):
    """Let a Flower strategy aggregate one round of full weights, in float64 so that its rounding tells nothing."""
    arrays = ArrayRecord({"w": Array(weights)})
    if hasattr(strategy, "eta"):
        strategy.current_arrays = {"w": weights}  # as its configure_train notes them
    elif strategy.current_arrays is None:
        strategy.current_arrays = arrays
    replies = []
    for node, (update, count) in enumerate(zip(updates, counts, strict=True), 1):
        arrays = ArrayRecord({"w": Array(weights + update)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": count})})
        replies.append(make_message(Metadata(1, "", node, 0, "", "", 0.0, 60.0, "train"), content))
    aggregated, _ = strategy.aggregate_train(number, replies)
    return aggregated["w"].numpy()


def test_every_strategy_starts_and_steps_in_float32():
    names = AggregationConfig.model_fields["strategy"].annotation.__args__
    for name, decay in itertools.product(sorted(set(names) - {"custom"}), (0.0, 0.9)):
        strategy = strategy_of(name, num_hospitals=2, ema_decay=decay)
        size = 3
        state, weights = strategy.init(size), np.ones(size, np.float32)
        sent = strategy.send(state, weights)
        assert np.array_equal(sent[:size], weights)
        update = np.full(size + strategy.extra(size), 0.25, np.float32)
        after_state, after = strategy.step(state, weights, update, 1.0)
        assert after.shape == (size,)
        assert after.dtype == np.float32
        assert (after != weights).all()
        assert after_state.keys() == state.keys()
        assert all(value.dtype == np.float32 for value in after_state.values())
