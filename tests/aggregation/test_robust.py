"""Robust rules: hand-computed numbers of two and three hospitals, Flower and ByzFL as oracles, and what breaks them."""

import importlib.util
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.aggregation import robust
from medfl_ray.aggregation.robust import CENTER, RULES, combine, num_hostile, why_too_few
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.aggregation import RobustConfig
from medfl_ray.errors import UpdateRejected


def updates_of(rows, weights=None, in_memory_bytes=2**30):
    rows = np.asarray(rows, dtype=np.float32)
    held = Updates(rows.shape[1], in_memory_bytes)
    for number, (row, weight) in enumerate(zip(rows, weights or [1] * len(rows), strict=True)):
        held.add(f"hospital-{number:03d}", row, weight)
    return held


def combined(rows, weights=None, state=None, **options):
    return combine(RobustConfig(**options), updates_of(rows, weights), state or {})


def random_rows(num=7, size=1000, seed=1):
    return np.random.default_rng(seed).normal(0.3, 1.0, (num, size)).astype(np.float32)


def byzfl_aggregators():
    """ByzFL's rules alone: the package's own start imports plotting and image libraries that they do not need."""
    if "byzfl.aggregators" not in sys.modules:
        found = importlib.util.find_spec("byzfl")
        if found is None or found.submodule_search_locations is None:
            pytest.skip("byzfl, the oracle of the robust rules, is not installed")
        package = types.ModuleType("byzfl")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def test_norm_bound_by_hand():
    # Norms 5, 10, 1000: the median is 10, so the third is shortened to (0, 10); weights 1, 1, 2.
    out = combined([[3, 4], [6, 8], [0, 1000]], [1, 1, 2], rule="norm_bound")
    np.testing.assert_allclose(out.update, [(3 + 6) / 4, (4 + 8 + 2 * 10) / 4], rtol=1e-6)
    assert out.state == {}
    # Two hospitals: norms 5 and 10, bound 7.5, halved by norm_factor; an update of zeros stays one.
    out = combined([[3, 4], [0, 10]], rule="norm_bound", norm_factor=0.5)
    np.testing.assert_allclose(out.update, [0.75 * 3 / 2, (0.75 * 4 + 3.75) / 2], rtol=1e-6)
    np.testing.assert_array_equal(combined([[0, 0], [0, 0], [3, 4]], rule="norm_bound").update, [0, 0])


def test_median_and_trimmed_mean_by_hand():
    np.testing.assert_array_equal(combined([[1, 9], [2, -5], [90, 4]], [1, 1, 99], rule="median").update, [2, 4])
    np.testing.assert_array_equal(combined([[1, 9], [3, -5]], rule="median").update, [2, 2])
    np.testing.assert_array_equal(combined([[1, 9], [2, -5], [90, 4]], [1, 1, 99], rule="trimmed_mean").update, [2, 4])
    np.testing.assert_array_equal(combined([[1, 9], [3, -5]], rule="trimmed_mean").update, [2, 2])
    five = [[0], [1], [2], [6], [100]]
    np.testing.assert_array_equal(combined(five, rule="trimmed_mean").update, [3])
    np.testing.assert_array_equal(combined(five, rule="trimmed_mean", num_hostile=2).update, [2])


def test_geometric_median_by_hand():
    # A triangle's Fermat point: of (0, 0), (4, 0), (2, 2 * sqrt(3)) the centre (2, 2 / sqrt(3)).
    triangle = [[0, 0], [4, 0], [2, 2 * 3**0.5]]
    out = combined(triangle, rule="geometric_median", iterations=500)
    np.testing.assert_allclose(out.update, [2, 2 / 3**0.5], atol=1e-6)
    # On a line it is the weighted median; two hospitals: whoever has more weight.
    assert combined([[0.0], [1.0], [9.0]], rule="geometric_median", iterations=2000).update[0] == pytest.approx(
        1, abs=1e-3
    )
    assert combined([[0.0], [8.0]], [1, 3], rule="geometric_median", iterations=2000).update[0] == pytest.approx(
        8, abs=1e-3
    )
    # One step by hand from the mean 6: distances 6 and 2, weights 1/4 and 3/4, so 1/24 to 3/8, a tenth to nine tenths.
    assert combined([[0.0], [8.0]], [1, 3], rule="geometric_median", iterations=1).update[0] == pytest.approx(7.2)


def test_krum_by_hand():
    # n = 5, f = 1: two nearest others. Squared distances on a line; 2 has 1 + 1, the others more.
    line = [[0.0], [1.0], [2.0], [3.0], [50.0]]
    scores = robust.krum_scores(updates_of(line), 1)
    np.testing.assert_allclose(scores, [1 + 4, 1 + 1, 1 + 1, 1 + 4, 47**2 + 48**2])
    np.testing.assert_array_equal(combined(line, [1, 1, 9, 1, 1], rule="krum").update, [1.0])  # the first of two best
    np.testing.assert_array_equal(combined(line, rule="multi_krum").update, [1.5])
    # Three hospitals none of whom is hostile: one nearest other, and Multi-Krum is the mean.
    three = [[0.0], [1.0], [3.0]]
    np.testing.assert_array_equal(combined(three, rule="krum", num_hostile=0).update, [0.0])
    np.testing.assert_allclose(combined(three, rule="multi_krum", num_hostile=0).update, [4 / 3])


def test_centered_clipping_by_hand():
    # From 0 with radius 2: (3, 4) becomes (1.2, 1.6), (0, 1) stays; the mean is (0.6, 1.3), and it is kept.
    first = combined([[3, 4], [0, 1]], rule="centered_clipping", clipping_radius=2, iterations=1)
    np.testing.assert_allclose(first.update, [0.6, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(first.state[CENTER], first.update)
    # From (0.6, 1.3) with radius 1: (1.6, 1.3) and (0.6, 0.3) are one away, (0.6, 11.3) becomes one away.
    rows = [[1.6, 1.3], [0.6, 0.3], [0.6, 11.3]]
    second = combined(rows, [1, 1, 9], first.state, rule="centered_clipping", clipping_radius=1, iterations=1)
    np.testing.assert_allclose(second.update, [0.6 + 1 / 3, 1.3], rtol=1e-6)
    # Without a radius it is the median distance: of 1, 2 and 30 from 0 the 2.
    out = combined([[1.0], [2.0], [30.0]], rule="centered_clipping", iterations=1)
    np.testing.assert_allclose(out.update, [5 / 3], rtol=1e-6)


def test_the_number_of_hostile_hospitals():
    assert [num_hostile(RobustConfig(), n) for n in (1, 2, 3, 5, 9, 10, 50)] == [0, 0, 1, 1, 1, 2, 10]
    assert num_hostile(RobustConfig(num_hostile=0), 50) == 0


@pytest.mark.parametrize(("rule", "fewest"), [("krum", 5), ("multi_krum", 5), ("median", 3), ("norm_bound", 3)])
def test_too_few_updates_are_refused_with_what_is_needed(rule, fewest):
    config = RobustConfig(rule=rule, num_hostile=1)
    assert why_too_few(config, fewest) is None
    assert f"{fewest} updates with f=1" in why_too_few(config, fewest - 1)
    with pytest.raises(UpdateRejected, match=f"{fewest} updates"):
        combine(config, updates_of(random_rows(fewest - 1)), {})


def test_an_update_alone_is_its_own_mean():
    rows = random_rows(1)
    for rule in ("norm_bound", "median", "trimmed_mean", "geometric_median"):
        np.testing.assert_allclose(combined(rows, rule=rule).update, rows[0], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_and_files_give_the_same_result(rule, monkeypatch):
    rows, config = random_rows(7, 5000), RobustConfig(rule=rule)
    state = {CENTER: rows[3] * 0.5}
    whole = combine(config, updates_of(rows), state).update
    monkeypatch.setattr(robust, "BLOCK_VALUES", 7 * 300)
    parted = combine(config, updates_of(rows, in_memory_bytes=3 * 5000 * 4), state).update
    np.testing.assert_allclose(parted, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_one_huge_update_of_seven_moves_no_rule_far(rule):
    honest = random_rows(6)
    mean, spread = honest.mean(axis=0), np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    hostile = np.full((1, honest.shape[1]), 1e4, dtype=np.float32)
    out = combined(np.vstack([honest, hostile]), rule=rule)
    assert np.linalg.norm(out.update - mean) < 1.1 * spread
    assert np.linalg.norm(np.vstack([honest, hostile]).mean(axis=0) - mean) > 1000 * spread


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(7)), rule=st.sampled_from(sorted(RULES)))
def test_no_rule_depends_on_who_was_first(order, rule):
    rows, config = random_rows(7, 50), RobustConfig(rule=rule)
    shuffled = Updates(50)
    for number in order:
        shuffled.add(f"hospital-{number:03d}", rows[number], number + 1)
    expected = combine(config, updates_of(rows, list(range(1, 8))), {}).update
    np.testing.assert_array_equal(combine(config, shuffled, {}).update, expected)


@pytest.mark.parametrize(("num", "f"), [(7, 1), (9, 2), (11, 3)])
def test_the_same_as_flower(num, f):
    aggregate = pytest.importorskip("flwr.server.strategy.aggregate")
    rows = random_rows(num, 500, num)
    results = [([row[:200].reshape(10, 20), row[200:]], 1) for row in rows]

    def flat(layers):
        return np.concatenate([np.ravel(layer) for layer in layers])

    for rule, expected in (
        ("median", aggregate.aggregate_median(results)),
        ("trimmed_mean", aggregate.aggregate_trimmed_avg(results, (f + 0.01) / num)),
        ("krum", aggregate.aggregate_krum(results, f, 0)),
        ("multi_krum", aggregate.aggregate_krum(results, f, num - f)),
    ):
        out = combined(rows, rule=rule, num_hostile=f).update
        np.testing.assert_allclose(out, flat(expected), atol=1e-6, err_msg=rule)


@pytest.mark.parametrize("f", [1, 2, 3])
def test_the_same_choice_as_flowers_newer_krum(f):
    multikrum = pytest.importorskip("flwr.serverapp.strategy.multikrum")
    from flwr.common import ArrayRecord, RecordDict

    rows = random_rows(11, 300, 5)
    contents = [RecordDict({"arrays": ArrayRecord([row])}) for row in rows]
    chosen = multikrum.select_multikrum(contents, f, 11 - f)
    mean = np.mean([content["arrays"].to_numpy_ndarrays()[0] for content in chosen], axis=0)
    np.testing.assert_allclose(combined(rows, rule="multi_krum", num_hostile=f).update, mean, atol=1e-6)


@pytest.mark.parametrize(("num", "f"), [(7, 1), (10, 2)])
def test_the_same_as_byzfl(num, f):
    byzfl = byzfl_aggregators()
    rows = random_rows(num, 500, num)
    wide = rows.astype(np.float64)
    for rule, expected in (("median", byzfl.Median()(wide)), ("trimmed_mean", byzfl.TrMean(f)(wide))):
        np.testing.assert_allclose(combined(rows, rule=rule, num_hostile=f).update, expected, atol=1e-6, err_msg=rule)


def test_the_same_geometric_median_as_byzfl():
    byzfl = byzfl_aggregators()
    rows = random_rows(7, 500)
    expected = byzfl.GeometricMedian(nu=1e-9, T=2000)(rows.astype(np.float64))
    out = combined(rows, rule="geometric_median", iterations=2000).update
    np.testing.assert_allclose(out, expected, atol=1e-6)
    # ByzFL starts from 0 and we from the mean: where that is 0, every step is the same.
    centred = rows - rows.mean(axis=0)
    for steps in (1, 2, 3):
        expected = byzfl.GeometricMedian(nu=1e-9, T=steps)(centred.astype(np.float64))
        out = combined(centred, rule="geometric_median", iterations=steps).update
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_the_same_centered_clipping_as_byzfl_over_rounds():
    byzfl = byzfl_aggregators()
    oracle, state = byzfl.CenteredClipping(L=3, tau=12.0), {}
    for number in range(3):
        rows = random_rows(6, 500, number)
        out = combined(rows, state=state, rule="centered_clipping", clipping_radius=12.0, iterations=3)
        np.testing.assert_allclose(out.update, oracle(rows.astype(np.float64)), atol=1e-6)
        state = out.state
