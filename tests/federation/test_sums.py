"""Sums of several hospitals: what does not belong to the round is refused whole, and nothing of it is taken down."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from medfl_ray.aggregation.fixed_point import add_updates, empty_sum, weighted_mean
from medfl_ray.errors import UpdateRejected
from medfl_ray.federation.collecting import UpdateCollector
from medfl_ray.federation.ports import SummedUpdates, TrainedHospital
from medfl_ray.federation.round_progress import RoundProgress
from medfl_ray.federation.screening import Expected
from medfl_ray.messages import ClientUpdate, Metric, RoundPlan
from medfl_ray.params import Layout


class Journal:
    """Takes down what a round notes as delivered."""

    def __init__(self):
        self.delivered = []

    def note_delivered(self, plan, hospitals):
        self.delivered.extend(hospitals)


def context(**more):
    return SimpleNamespace(store=Journal(), secret_cohorts=False, **more)


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


LAYOUT = SimpleNamespace(checksum="layout", size=4)


def collecting(round, layout=LAYOUT):
    progress = RoundProgress(round, PLAN)
    return progress, UpdateCollector(progress, Expected(PLAN, layout, {"a": 2, "b": 2, "c": 2}, 1.0), {})


def sum_of(*names, **changes):
    updates = np.arange(4 * len(names), dtype=np.float32).reshape(-1, 4)
    total = add_updates(empty_sum(4), updates, [2] * len(names))
    trained = tuple(TrainedHospital(name, 1, {"train_loss": Metric(value=1.0, label="public")}) for name in names)
    return replace(SummedUpdates(3, 2, "layout", total, trained), **changes)


def test_sums_of_a_round_become_its_mean():
    round = context()
    progress, collector = collecting(round)
    for part in (sum_of("b", "a"), sum_of("c")):
        collector.add_sum(part)
    assert progress.trained == {"a", "b", "c"}
    assert round.store.delivered == ["b", "a", "c"]
    assert progress.metrics["c"]["train_loss"].value == 1.0
    assert np.allclose(weighted_mean(collector.total), (np.arange(4) + np.arange(4, 8) + np.arange(4)) / 3)


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
    round = context()
    progress, collector = collecting(round)
    collector.add_sum(sum_of("c"))
    before = weighted_mean(collector.total).copy()
    with pytest.raises(UpdateRejected, match=word):
        collector.add_sum(bad)
    assert progress.trained == {"c"}
    assert round.store.delivered == ["c"]
    assert set(progress.metrics) == {"c"}
    assert np.array_equal(weighted_mean(collector.total), before)


def test_an_update_that_does_not_fit_into_the_sum_is_not_taken_down_as_delivered():
    run = SimpleNamespace(attack=None, federation=SimpleNamespace(stragglers="drop"))
    round, layout = context(run=run, keys={}, hospital_dp=None), Layout(("w",), ((4,),))
    progress, collector = collecting(round, layout)
    update = ClientUpdate("a", 3, 2, np.ones(4, np.float32), layout.checksum, 2, 1, None, {})
    collector.total = replace(sum_of("c").total, magnitude=2.0**62 - 1)
    with pytest.raises(UpdateRejected, match="too large"):
        collector.screen_and_add(update)
    assert (progress.trained, progress.metrics, round.store.delivered) == (set(), {}, [])
    collector.total = sum_of("c").total
    collector.screen_and_add(update)
    assert (progress.trained, round.store.delivered) == ({"a"}, ["a"])
