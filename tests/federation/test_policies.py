"""Decisions about rounds, without hospitals."""

from collections import Counter

import pytest

from medfl_ray.config.federation import FederationConfig
from medfl_ray.federation.hospital_rules.labels import label_for, labelled
from medfl_ray.federation.policies import (
    LONGEST_EXCLUSION,
    FailureHistory,
    Standing,
    after_round,
    can_start,
    hospitals_to_retry,
    judge_round,
    pause_before,
    why_left_out,
)
from medfl_ray.federation.selection import enough_updates, select_hospitals
from medfl_ray.messages import ClientFailure, Receipt


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
    assert can_start(config, 3).may_start
    assert not can_start(config, 2).may_start
    assert not can_start(FederationConfig(min_clients=4), 3).may_start


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


def failure(hospital="a", stage="train", round=1, **changes):
    return ClientFailure(hospital=hospital, round=round, attempt=1, stage=stage, reason="it fell", **changes)


def receipt(*failures, asked=("a", "b"), trained=(), late=None, round=1):
    return Receipt(
        job="j", round=round, attempt=1, plan_hash="", config_hash="", asked=asked, trained=trained,
        failures=failures, update_hashes={}, spent={}, weights_before="", weights_after=None, published=False,
        ended_at="", late=late or {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "failures"),
    [
        (receipt(trained=("a",)), 0),
        (receipt(late={"a": 1}), 0),
        (receipt(failure(stage="train")), 3),
        (receipt(failure(stage="late")), 3),
        (receipt(failure(stage="reserve")), 3),
        (receipt(failure(stage="screen")), 3),
        (receipt(failure(stage="surplus")), 2),
        (receipt(failure(stage="evaluate")), 2),
        (receipt(failure("b")), 2),
        (receipt(), 2),
        (receipt(failure(), trained=("a",)), 0),
    ],
)
def test_a_standing_counts_failures_in_a_row(one, failures):
    assert after_round(Standing(2, "before"), "a", one).failures == failures


def test_a_failing_hospital_sits_out_longer_each_time_and_returns_with_an_update():
    config = FederationConfig(max_hospital_failures=2, min_clients=1, min_available_clients=1)
    failure_history, asked_in = FailureHistory(), []
    for number in range(1, 45):
        left_out = failure_history.left_out(["a", "b"], config)
        assert "b" not in left_out
        if "a" in left_out:
            assert "failures in a row; the last: it fell" in left_out["a"]
            failure_history = failure_history.after(
                receipt(failure(stage="select", round=number), asked=("b",), trained=("b",), round=number)
            )
        else:
            asked_in.append(number)
            failure_history = failure_history.after(receipt(failure(round=number), trained=("b",), round=number))
    assert asked_in == [1, 2, 4, 7, 12, 21, 38]
    failure_history = failure_history.after(receipt(trained=("a", "b")))
    assert failure_history.left_out(["a", "b"], config) == {}
    assert why_left_out(Standing(100, "x", LONGEST_EXCLUSION), 2) is None
    assert "1 more round after" in why_left_out(Standing(2, "x"), 2)
    assert "16 more rounds" in why_left_out(Standing(100, "x"), 2)


def test_nobody_sits_out_where_too_few_would_remain():
    config = FederationConfig(max_hospital_failures=1, min_clients=2, min_available_clients=2)
    failure_history = FailureHistory([receipt(failure())])
    assert failure_history.left_out(["a", "b"], config) == {}
    assert list(failure_history.left_out(["a", "b", "c"], config)) == ["a"]


def test_only_a_fault_that_may_pass_and_costs_nothing_is_tried_again():
    harmless = failure("a", "reserve", may_have_left=False, transient=True)
    refused = failure("b", "reserve", may_have_left=False)
    trained = failure("c", "train", transient=True)
    assert hospitals_to_retry([harmless, refused, trained]) == ["a"]
    assert hospitals_to_retry([harmless, refused, trained], may_train_again=["c"]) == ["a", "c"]
    assert [pause_before(retry) for retry in (1, 2, 3)] == [0.5, 1.0, 2.0]


def test_over_selection_asks_more_and_closes_with_enough():
    from small_runs import small_run

    names = [f"h{i}" for i in range(10)]
    assert len(select_hospitals(names, 0.5, 1, 1, over_selection=0.3)) == 7
    assert len(select_hospitals(names, 1.0, 1, 1, over_selection=0.3)) == 10
    run = small_run(federation={"fraction": 0.5, "over_selection": 0.3})
    assert enough_updates(run, 10, 7) == 5
    assert enough_updates(run, 10, 5) is None
    assert enough_updates(small_run(federation={"fraction": 0.5}), 10, 5) is None
