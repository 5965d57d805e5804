"""Decisions about rounds, without hospitals."""

from collections import Counter

import pytest

from medfl_ray.config import FederationConfig
from medfl_ray.federation.labels import label_for, labelled
from medfl_ray.federation.policies import can_start, judge_round
from medfl_ray.federation.selection import select_hospitals


@pytest.mark.parametrize(
    ("updates", "failed_before", "verdict"),
    [(3, 0, "publish"), (2, 0, "publish"), (1, 0, "skip"), (1, 2, "stop"), (0, 5, "stop")],
)
def test_a_round_is_published_at_quorum_only(updates, failed_before, verdict):
    config = FederationConfig(min_clients=2, max_failed_rounds=2)
    decision = judge_round(config, updates, 4, failed_before)
    assert decision.verdict == verdict
    assert f"{updates} of 4" in decision.reason


def test_a_run_starts_with_enough_hospitals_only():
    config = FederationConfig(min_available_clients=3)
    assert can_start(config, 3).verdict == "publish"
    assert can_start(config, 2).verdict == "stop"
    assert can_start(FederationConfig(min_clients=4), 3).verdict == "stop"


def test_selection_is_repeatable_and_covers_everybody_in_time():
    names = [f"h{i}" for i in range(10)]
    assert select_hospitals(names, 0.3, 7, 4) == select_hospitals(list(reversed(names)), 0.3, 7, 4)
    assert select_hospitals(names, 1.0, 7, 4) == tuple(sorted(names))
    drawn = Counter(name for round in range(200) for name in select_hospitals(names, 0.3, 7, round))
    assert all(35 <= drawn[name] <= 90 for name in names)
    assert len(select_hospitals(names, 0.25, 0, 1)) == 3


@pytest.mark.parametrize(
    ("declared", "dp", "label"),
    [
        ("public", True, "public"),
        ("synthetic", False, "public"),
        ("private", True, "suppressed"),
        ("private", False, "unprotected"),
    ],
)
def test_labels_of_figures_that_leave_a_hospital(declared, dp, label):
    assert label_for(declared, dp) == label
    metric = labelled({"dice": 0.5}, declared, dp)["dice"]
    assert (metric.value is None) == (label == "suppressed")
