"""Answers about private data leave at times that follow from declared figures."""

import pytest

from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes, answer_step_s


class Clock:
    """A clock that stands still but for work and sleep."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        assert seconds >= 0
        self.time += seconds


def left_after(clock, times, work_s, step_s=1.0, kind="describe"):
    started = clock.time
    with times.padded(kind, step_s):
        clock.time += work_s
    return clock.time - started


@pytest.mark.parametrize(
    ("work_s", "left_s"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (1.01, 2.0), (3.0, 4.0), (9.0, 16.0)]
)
def test_hole_the_time_of_an_answer_is_the_step_or_the_step_doubled(work_s, left_s):
    clock = Clock()
    assert left_after(clock, AnswerTimes(clock.now, clock.sleep), work_s) == pytest.approx(left_s)


def test_a_step_that_was_too_short_stays_doubled_for_its_kind():
    clock = Clock()
    times = AnswerTimes(clock.now, clock.sleep)
    assert left_after(clock, times, 3.0) == pytest.approx(4.0)
    assert left_after(clock, times, 0.1) == pytest.approx(4.0)
    assert left_after(clock, times, 0.1, kind="evaluate") == pytest.approx(1.0)


def test_hole_a_failure_leaves_as_late_as_a_success():
    clock = Clock()
    times = AnswerTimes(clock.now, clock.sleep)

    def fail_after_work():
        with times.padded("describe", 1.0):
            clock.time += 0.2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_work()
    assert clock.time == pytest.approx(101.0)


def test_the_step_follows_from_the_declared_number_of_patients():
    policy = SitePolicy(hospital="a", data_set="d", num_patients=200)
    assert answer_step_s(policy) == pytest.approx(4.0)
    assert answer_step_s(policy, passes=3) == pytest.approx(12.0)
    assert answer_step_s(policy.model_copy(update={"num_patients": 2})) == 0.25
