"""Sums of updates: exact, order-independent, and closed to values that would break them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.aggregation import directed_rounding
from medfl_ray.aggregation.directed_rounding import rounding_down
from medfl_ray.aggregation.fixed_point import BLOCK, add_update, add_updates, empty_sum, merge_sums, weighted_mean
from medfl_ray.errors import UpdateRejected


def test_two_hospitals_by_hand():
    total = empty_sum(2)
    total = add_update(total, np.array([1.0, -2.0], np.float32), 3)
    total = add_update(total, np.array([5.0, 2.0], np.float32), 1)
    assert weighted_mean(total).tolist() == [2.0, -1.0]
    assert (total.weight, total.num_updates) == (4, 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_any_order_and_any_grouping_give_the_same_bits(seed, num_hospitals):
    rng = np.random.default_rng(seed)
    updates = [rng.normal(size=17).astype(np.float32) * 10.0 ** rng.integers(-6, 3) for _ in range(num_hospitals)]
    weights = [int(w) for w in rng.integers(1, 500, num_hospitals)]
    in_order = empty_sum(17)
    for update, weight in zip(updates, weights, strict=True):
        in_order = add_update(in_order, update, weight)
    order, cut = rng.permutation(num_hospitals), int(rng.integers(1, num_hospitals))
    parts = []
    for chunk in (order[:cut], order[cut:]):
        part = empty_sum(17)
        for i in chunk:
            part = add_update(part, updates[i], weights[i])
        parts.append(part)
    grouped = merge_sums(parts[1], parts[0])
    assert weighted_mean(in_order).tobytes() == weighted_mean(grouped).tobytes()


def test_mean_is_as_exact_as_float32():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(50, 1000)).astype(np.float32)
    total = empty_sum(1000)
    for update in updates:
        total = add_update(total, update, 7)
    expected = updates.astype(np.float64).mean(axis=0)
    assert np.abs(weighted_mean(total) - expected).max() < 1e-7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_would_break_the_sum_are_refused_and_leave_it_unchanged(bad):
    total = add_update(empty_sum(3), np.ones(3, np.float32), 2)
    before = total.total.copy()
    with pytest.raises(UpdateRejected, match="not finite or too large"):
        add_update(total, np.array([0, bad, 0], np.float32), 1)
    assert (total.total == before).all()


def test_wrong_shape_and_empty_sum_are_refused():
    with pytest.raises(UpdateRejected, match="shape"):
        add_update(empty_sum(3), np.ones(4, np.float32), 1)
    with pytest.raises(UpdateRejected, match="no update"):
        weighted_mean(empty_sum(3))
    with pytest.raises(UpdateRejected, match="shapes"):
        merge_sums(empty_sum(3), empty_sum(4))


@pytest.mark.parametrize(("weight", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_weight_that_counts_nobody_is_refused(weight, error):
    total = add_update(empty_sum(3), np.ones(3, np.float32), 2)
    with pytest.raises(error):
        add_updates(total, np.ones((2, 3), np.float32), [1, weight])
    assert np.array_equal(weighted_mean(total), [1, 1, 1])


def test_weights_may_be_numpys_integers_of_any_width():
    total = add_updates(empty_sum(3), np.ones((2, 3), np.float32), np.array([200, 100], np.uint8))
    assert (total.weight, total.num_updates) == (300, 2)
    assert np.array_equal(weighted_mean(total), [1, 1, 1])


@pytest.mark.parametrize("largest", [1e-9, 1.0, 3e4, 1e5])
@pytest.mark.parametrize("size", [5, BLOCK + 17])
def test_every_update_is_rounded_once_whether_it_comes_alone_or_with_others(size, largest):
    rng = np.random.default_rng(1)
    updates = (rng.uniform(-1, 1, (6, size)) * largest / np.sqrt(size)).astype(np.float32)
    updates[0, :3] = 2.5 * 2.0**-36, 3.5 * 2.0**-36, -0.5 * 2.0**-36  # halfway between two sums
    weights = [1, 2, 3, 500, 7, 1]
    expected = sum(
        np.floor(update.astype(np.float64) * 2.0**36).astype(np.int64) * weight
        for update, weight in zip(updates, weights, strict=True)
    )
    together = add_updates(empty_sum(size), updates, weights)
    alone = empty_sum(size)
    for update, weight in zip(updates, weights, strict=True):
        alone = add_update(alone, update, weight)
    assert (together.total == expected).all()
    assert (alone.total == expected).all()
    assert (together.weight, together.num_updates) == (514, 6)
    assert together.magnitude == pytest.approx(alone.magnitude)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_update_of_several_leaves_the_sum_unchanged(bad):
    updates = np.ones((3, BLOCK + 5), np.float32)
    updates[1, -1] = bad
    total = add_update(empty_sum(BLOCK + 5), np.full(BLOCK + 5, 0.25, np.float32), 2)
    before = total.total.copy()
    with pytest.raises(UpdateRejected, match="not finite or too large"):
        add_updates(total, updates, [1, 2, 3])
    assert (total.total == before).all()


def test_without_the_processors_mode_sums_have_the_same_bits(monkeypatch):
    rng = np.random.default_rng(2)
    updates = (rng.standard_normal((5, BLOCK + 3)) * 10.0 ** rng.integers(-9, 1, (5, BLOCK + 3))).astype(np.float32)
    weights = [3, 20, 3, 3, 1]
    quick = add_updates(empty_sum(BLOCK + 3), updates, weights)
    monkeypatch.setattr(directed_rounding, "_MODE", None)
    slow = add_updates(empty_sum(BLOCK + 3), updates, weights)
    assert (quick.total == slow.total).all()
    assert quick.magnitude == pytest.approx(slow.magnitude, rel=1e-3)
    with pytest.raises(UpdateRejected, match="not finite or too large"):
        add_updates(slow, np.full((1, BLOCK + 3), np.nan, np.float32), [1])
    assert (quick.total == slow.total).all()


def test_additions_round_downward_inside_the_block_and_as_before_after_it():
    def third_and_its_negative():
        return np.full(9, 1.0) / np.full(9, 3.0), np.full(9, -1.0) / np.full(9, 3.0)

    before = third_and_its_negative()
    with rounding_down() as rounds_down:
        inside = third_and_its_negative()
    assert rounds_down, "this processor's mode is not known: sums are right and slow"
    assert (inside[1] < before[1]).all()
    assert np.array_equal(third_and_its_negative(), before)


def test_an_error_inside_the_block_leaves_no_mode_behind():
    with pytest.raises(UpdateRejected):
        add_updates(empty_sum(3), np.full((1, 3), np.inf, np.float32), [1])
    assert (np.full(9, 1.0) + np.full(9, 0.75 * 2.0**-52) > 1.0).all()


def test_a_mode_that_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(directed_rounding, "_MODE", (lambda: 0, lambda _: 0, 0x400))
    with rounding_down() as rounds_down:
        assert not rounds_down
