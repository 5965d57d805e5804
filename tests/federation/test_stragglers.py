"""Rounds with slow, flaky and failing hospitals, in this process and with real training."""

import time

import pytest
from manual_clock import ManualClock
from small_runs import Interfering, small_run

from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError
from medfl_ray.messages import ClientFailure
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts


class Slow:
    """A pool in which one hospital's training takes longer than the round has, by the clock of the test."""

    def __init__(self, pool, hospital, rounds, wait_s, clock):
        self._pool = pool
        whole = pool._tell

        def tell(name, plan, ask):
            answer = whole(name, plan, ask)
            if name == hospital and plan.round in rounds and hasattr(answer, "delta"):
                clock.now += wait_s
            return answer

        pool._tell = tell

    def __getattr__(self, name):
        return getattr(self._pool, name)


def run_it(run, tmp_path, wrap=lambda pool, names: pool, clock=time.monotonic):
    import threading

    policies = tuple(list_hospitals(run))
    names = [policy.hospital for policy in policies]
    output = run.output.model_copy(update={"directory": tmp_path})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    pool = wrap(local_pool(hospital_specs(run, policies, folder.path), clock), sorted(names))
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return outcome, folder, sorted(names)


def test_a_late_update_is_kept_for_the_next_round_and_counted_once(tmp_path):
    run = small_run(federation={"rounds": 3, "deadline_s": 4, "stragglers": "keep"})
    clock = ManualClock()
    outcome, folder, names = run_it(run, tmp_path, lambda pool, names: Slow(pool, names[-1], {1}, 5, clock), clock)
    assert outcome.completed
    first, second, third = folder.receipts()
    assert [(f.hospital, f.stage) for f in first.failures] == [(names[-1], "late")]
    assert first.trained == tuple(names[:-1])
    assert second.late == {names[-1]: 1}
    assert second.trained == tuple(names)
    assert set(second.update_hashes) == {*names, f"{names[-1]}, round 1"}
    assert third.late == {}
    assert outcome.absent == ()
    verify_receipts(read_receipts(folder.path / "receipts.jsonl")[0])


def test_a_late_update_is_dropped_by_default_and_the_round_closes_in_time(tmp_path):
    run = small_run(federation={"rounds": 2, "deadline_s": 4})
    clock = ManualClock()
    outcome, folder, names = run_it(run, tmp_path, lambda pool, names: Slow(pool, names[-1], {1}, 5, clock), clock)
    first, second = folder.receipts()
    assert outcome.completed
    assert [(f.hospital, f.stage) for f in first.failures] == [(names[-1], "late")]
    assert (second.late, second.failures) == ({}, ())


def test_with_enough_updates_the_round_closes_and_who_had_not_begun_gets_its_epsilon_back(tmp_path):
    run = small_run(
        federation={"rounds": 1, "fraction": 0.5, "over_selection": 0.5},
        privacy={"enable_dp": True, "noise_multiplier": 5.0, "sample_rate": 0.5},
    )
    outcome, folder, names = run_it(run, tmp_path)
    assert outcome.completed
    (receipt,) = folder.receipts()
    assert (len(receipt.asked), len(receipt.trained)) == (3, 2)
    (surplus,) = receipt.failures
    assert (surplus.stage, surplus.reason) == ("surplus", "2 others had delivered, which is enough")
    import json

    ledgers = json.loads((folder.path / "ledger.json").read_text())
    kinds = {name: [event["kind"] for event in ledgers[name]["events"]] for name in names}
    assert kinds[surplus.hospital] == ["reserve", "release"]
    assert all(kinds[name] == ["reserve", "settle"] for name in receipt.trained)


def failing(hospital, rounds, **changes):
    """Let a hospital's first answers of the named rounds be failures; return the change and what it has seen."""
    seen = []

    def change(update):
        if update.hospital == hospital and update.round in rounds and (update.round not in seen or not changes):
            seen.append(update.round)
            yield ClientFailure(
                hospital=hospital, round=update.round, attempt=update.attempt, stage="train", reason="fell", **changes
            )
        else:
            yield update

    return change, seen


def test_without_dp_a_passing_fault_is_tried_again_in_the_round(tmp_path):
    run = small_run(federation={"rounds": 1})
    expected, _, _ = run_it(run, tmp_path / "whole")
    names = sorted(policy.hospital for policy in list_hospitals(run))
    change, seen = failing(names[1], {1}, transient=True)
    outcome, folder, _ = run_it(run, tmp_path, lambda pool, _: Interfering(pool, change))
    (receipt,) = folder.receipts()
    assert seen == [1]
    assert receipt.trained == tuple(names)
    assert [(f.hospital, f.reason) for f in receipt.failures] == [(names[1], "fell")]
    assert outcome.weights_checksum == expected.weights_checksum


def test_under_dp_nothing_is_trained_twice_in_a_round(tmp_path):
    run = small_run(federation={"rounds": 1}, privacy={"enable_dp": True, "noise_multiplier": 5.0, "sample_rate": 0.5})
    names = sorted(policy.hospital for policy in list_hospitals(run))
    change, seen = failing(names[1], {1}, transient=True)
    _, folder, _ = run_it(run, tmp_path, lambda pool, _: Interfering(pool, change))
    (receipt,) = folder.receipts()
    assert seen == [1]
    assert receipt.trained == (names[0], names[2])


def test_a_hospital_that_keeps_failing_sits_out_is_named_and_returns(tmp_path):
    run = small_run(federation={"rounds": 6, "local_steps": 1, "max_hospital_failures": 2, "eval_every": 6})
    names = sorted(policy.hospital for policy in list_hospitals(run))
    change, _ = failing(names[0], {1, 2})
    outcome, folder, _ = run_it(run, tmp_path, lambda pool, _: Interfering(pool, change))
    receipts = folder.receipts()
    assert [names[0] in receipt.asked for receipt in receipts] == [True, True, False, True, True, True]
    assert [f.stage for f in receipts[2].failures] == ["select"]
    assert "2 failures in a row; the last: fell" in receipts[2].failures[0].reason
    assert names[0] in receipts[3].trained
    assert outcome.absent == ()


def test_policies_that_need_one_another_or_exclude_one_another():
    with pytest.raises(ConfigError, match="without deadline_s"):
        small_run(federation={"stragglers": "keep"})
    raw = small_run(federation={"deadline_s": 9, "stragglers": "keep"}).model_dump(mode="json")
    raw["privacy"] = {"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0}
    raw["aggregation"]["weighting"] = "uniform"
    with pytest.raises(ConfigError, match="who was in time"):
        parse_run_config(raw)
