"""Sums of several hospitals: what does not belong to the round is refused whole, and nothing of it is taken down."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from medfl_ray.aggregation.fixed_point import add_updates, empty_sum, weighted_mean
from medfl_ray.errors import UpdateRejected
from medfl_ray.federation.collecting import add_sum, screen_and_add
from medfl_ray.federation.ports import SummedUpdates, TrainedHospital
from medfl_ray.federation.round_context import RoundProgress
from medfl_ray.federation.screening import Expected
from medfl_ray.messages import ClientUpdate, Metric, RoundPlan
from medfl_ray.params import Layout


class Journal:
    """Takes down what a round notes as delivered."""

    def __init__(self):
        self.delivered = []

    def note_delivered(self, plan, hospitals):
        self.delivered.extend(hospitals)


def context():
    return SimpleNamespace(layout=SimpleNamespace(checksum="layout", size=4), store=Journal(), secret_cohorts=False)


PLAN = RoundPlan(
    job="job",
    round=3,
    attempt=2,
    config_hash="",
    weights_checksum="",
    hospitals=("a", "b", "c"),
    num_steps={"a": 1, "b": 1, "c": 1},
    learning_rate=0.1,
    mechanisms={},
)


def sum_of(*names, **changes):
    updates = np.arange(4 * len(names), dtype=np.float32).reshape(-1, 4)
    total = add_updates(empty_sum(4), updates, [2] * len(names))
    trained = tuple(TrainedHospital(name, 1, {"train_loss": Metric(value=1.0, label="public")}) for name in names)
    return replace(SummedUpdates(3, 2, "layout", total, trained), **changes)


def test_sums_of_a_round_become_its_mean():
    progress, total, round = RoundProgress(), empty_sum(4), context()
    for part in (sum_of("b", "a"), sum_of("c")):
        total = add_sum(round, total, part, PLAN, progress)
    assert progress.trained == {"a", "b", "c"}
    assert round.store.delivered == ["b", "a", "c"]
    assert progress.metrics["c"]["train_loss"].value == 1.0
    assert np.allclose(weighted_mean(total), (np.arange(4) + np.arange(4, 8) + np.arange(4)) / 3)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (sum_of("a", round=2), "round 2"),
        (sum_of("a", attempt=1), "attempt 1"),
        (sum_of("a", layout_checksum="another"), "layout"),
        (sum_of("a", "b", trained=sum_of("a").trained), "number of updates"),
        (sum_of("a", "stranger"), "not asked"),
        (sum_of("a", "a"), "not asked or has delivered"),
        (sum_of("a", "c"), "delivered already"),
        (sum_of("a", total=replace(sum_of("a").total, magnitude=2.0**62)), "too large"),
    ],
)
def test_a_sum_that_does_not_belong_here_is_refused_whole(bad, word):
    progress, round = RoundProgress(), context()
    total = add_sum(round, empty_sum(4), sum_of("c"), PLAN, progress)
    before = weighted_mean(total).copy()
    with pytest.raises(UpdateRejected, match=word):
        add_sum(round, total, bad, PLAN, progress)
    assert progress.trained == {"c"}
    assert round.store.delivered == ["c"]
    assert set(progress.metrics) == {"c"}
    assert np.array_equal(weighted_mean(total), before)


def test_an_update_that_does_not_fit_into_the_sum_is_not_taken_down_as_delivered():
    progress, round = RoundProgress(), context()
    round.run = SimpleNamespace(attack=None, federation=SimpleNamespace(stragglers="drop"))
    round.history, round.keys, round.hospital_dp = SimpleNamespace(late_plans={}), {}, None
    expected = Expected(PLAN, Layout(("w",), ((4,),)), {"a": 2, "b": 2, "c": 2}, 1.0)
    update = ClientUpdate("a", 3, 2, np.ones(4, np.float32), expected.layout.checksum, 2, 1, None, {})
    full = replace(sum_of("c").total, magnitude=2.0**62 - 1)
    with pytest.raises(UpdateRejected, match="too large"):
        screen_and_add(round, full, update, expected, progress)
    assert (progress.trained, progress.metrics, round.store.delivered) == (set(), {}, [])
    screen_and_add(round, sum_of("c").total, update, expected, progress)
    assert (progress.trained, round.store.delivered) == ({"a"}, ["a"])
