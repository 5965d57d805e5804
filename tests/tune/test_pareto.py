"""The front and what is recommended of it: nothing on it is beaten, everything off it is, whatever the order."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.pareto import Point, balanced, beats, cheapest, epsilon_for, front, privacy_front

coarse = st.integers(1, 6)  # few different values, so that equals are common


@st.composite
def points_of(draw, least=0):
    rows = draw(st.lists(st.tuples(coarse, coarse, coarse), min_size=least, max_size=12))
    return [point(number, eps, dice / 10, size) for number, (eps, dice, size) in enumerate(rows)]


def point(number, epsilon, dice, size_bytes=1.0):
    return Point(number, float(epsilon), dice, float(size_bytes), dice, dice)


@given(points_of())
def test_nothing_on_the_front_is_beaten_and_everything_else_is_by_somebody_on_it(points):
    kept = front(points)
    assert not any(beats(other, own) for own in kept for other in points)
    assert all(any(beats(own, lost) for own in kept) for lost in points if lost not in kept)
    assert bool(kept) == bool(points)


@given(points_of(), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(points, rng: random.Random):
    shuffled = list(points)
    rng.shuffle(shuffled)
    assert front(shuffled) == front(points)
    assert privacy_front(shuffled) == privacy_front(points) or len({p.costs for p in points}) < len(points)


@given(points_of())
def test_a_front_is_its_own_front(points):
    assert front(front(points)) == front(points)


@given(coarse, coarse, coarse, coarse, coarse, coarse)
def test_of_two_points_at_most_one_beats_the_other(a, b, c, d, e, f):
    one, other = point(0, a, b / 10, c), point(1, d, e / 10, f)
    assert not (beats(one, other) and beats(other, one))
    assert not beats(one, one)


@given(points_of(least=1))
def test_what_is_recommended_lies_on_the_front(points):
    best = balanced(points)
    assert not any(beats(other, best) for other in points)


@given(points_of(least=1), st.floats(0.05, 0.65))
def test_a_better_dice_never_needs_less_epsilon(points, dice):
    needed, more = epsilon_for(points, dice), epsilon_for(points, dice + 0.05)
    assert more is None or (needed is not None and needed <= more)


@given(points_of(least=1), st.floats(0.05, 0.65))
def test_an_epsilon_is_named_exactly_where_a_trial_reached_the_dice(points, dice):
    reached, needed = cheapest(points, dice), epsilon_for(points, dice)
    assert (needed is None) == (reached is None) == all(p.dice < dice for p in points)
    if needed is not None:
        assert min(p.epsilon for p in points) <= needed <= reached.epsilon


def test_between_two_trials_the_epsilon_lies_on_the_line_over_its_logarithm():
    points = [point(0, 1, 0.4), point(1, 4, 0.8), point(2, 16, 0.8), point(3, 2, 0.1)]
    assert epsilon_for(points, 0.6) == pytest.approx(2.0)  # half-way from ln 1 to ln 4
    assert epsilon_for(points, 0.8) == 4
    assert epsilon_for(points, 0.3) == 1  # nothing smaller was tried
    assert epsilon_for(points, 0.81) is None


def test_the_knee_is_recommended_and_not_the_cheapest_failure():
    points = [point(0, 2.1, 0.17, 1), point(1, 5.6, 0.56, 3), point(2, 6.5, 0.63, 5), point(3, 9, 0.01, 4)]
    assert balanced(points).number == 1
    assert balanced([]) is None
    assert cheapest(points, 0.6).number == 2


def test_traffic_keeps_a_point_on_the_front_and_out_of_the_line():
    points = [point(0, 4, 0.8, 9), point(1, 4, 0.7, 2)]
    assert [p.number for p in front(points)] == [0, 1]
    assert [p.number for p in privacy_front(points)] == [0]


def test_a_point_without_a_score_is_beaten_by_nobody_and_needs_no_special_case():
    assert not beats(point(0, 1, math.nan), point(1, 1, 0.5))
