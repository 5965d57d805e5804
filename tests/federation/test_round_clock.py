"""The deadline of a round begins with its reservation, in every pool."""

import pytest

from medfl_ray.federation.round_clock import RoundClock
from medfl_ray.messages import RoundPlan


def plan(number=1, attempt=1, deadline_s=10.0):
    return RoundPlan(
        job="job",
        round=number,
        attempt=attempt,
        config_hash="",
        weights_checksum="",
        hospitals=("a",),
        num_steps={"a": 1},
        learning_rate=0.1,
        mechanisms={},
        deadline_s=deadline_s,
    )


@pytest.fixture
def time_and_clock():
    now = [100.0]
    return now, RoundClock(lambda: now[0])


def test_it_counts_from_the_first_word_of_an_attempt(time_and_clock):
    now, clock = time_and_clock
    assert clock.seconds_since_start(plan()) == 0.0
    now[0] = 104.0
    assert clock.seconds_since_start(plan()) == 4.0
    assert clock.seconds_left(plan()) == 6.0
    assert clock.end(plan()) == 110.0


def test_a_retry_of_some_hospitals_does_not_start_it_again(time_and_clock):
    now, clock = time_and_clock
    clock.seconds_since_start(plan())
    now[0] = 107.0
    assert clock.seconds_left(plan().among(["a"])) == 3.0


@pytest.mark.parametrize("following", [{"number": 2}, {"attempt": 2}])
def test_the_next_attempt_or_round_starts_it_again(time_and_clock, following):
    now, clock = time_and_clock
    clock.seconds_since_start(plan())
    now[0] = 107.0
    assert clock.seconds_left(plan(**following)) == 10.0


def test_it_is_late_behind_the_deadline_and_not_on_it(time_and_clock):
    now, clock = time_and_clock
    clock.seconds_since_start(plan())
    now[0] = 110.0
    assert not clock.is_late(plan())
    now[0] = 110.5
    assert clock.is_late(plan())
    assert clock.seconds_left(plan()) == 0.0


def test_without_a_deadline_nothing_is_late(time_and_clock):
    now, clock = time_and_clock
    clock.seconds_since_start(plan(deadline_s=None))
    now[0] = 1e9
    assert not clock.is_late(plan(deadline_s=None))
    assert clock.seconds_left(plan(deadline_s=None)) is None
    assert clock.end(plan(deadline_s=None)) is None
