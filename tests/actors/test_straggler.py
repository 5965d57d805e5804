"""Slow and hanging hospitals in processes of their own: rounds close in time, and nobody waits for them."""

import threading
import time

import pytest
from small_runs import small_run

from actors.ray_pool import RayPool
from medfl_ray.assembly.run import hospital_specs, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

pytestmark = [pytest.mark.ci, pytest.mark.timeout(300)]
DEADLINE_S = 20.0
LONG_S = 60.0  # seven processes start to train on two cores


class Disturbed:
    """A Ray pool in which named hospitals' processes sleep before they train, or end."""

    def __init__(self, pool, slow=None, dropped=()):
        self._pool, self._slow, self._dropped, self._restarting = pool, slow or {}, dropped, []
        self.closed_after = []

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def reserve(self, plan):
        self._wait_for_restarts()
        self._began = time.monotonic()
        return self._pool.reserve(plan)

    def train(self, plan, hospitals, weights):
        import ray

        for name in hospitals:
            actor = self._pool._actors[name]
            seconds = self._slow.get((name, plan.round))
            if seconds:
                actor.__ray_call__.remote(lambda self, seconds=seconds: time.sleep(seconds))
            if (name, plan.round) in self._dropped:
                ray.kill(actor, no_restart=False)
                self._restarting.append(actor)
        yield from self._pool.train(plan, hospitals, weights)
        self.closed_after.append(time.monotonic() - self._began)

    def _wait_for_restarts(self, within_s=120):
        """Wait until who dropped out of a round is there for the next: rounds here are quicker than processes start."""
        import ray
        from ray.exceptions import RayActorError

        ends = time.monotonic() + within_s
        while self._restarting and time.monotonic() < ends:
            try:
                ray.get(self._restarting[0].process_id.remote())
                self._restarting.pop(0)
            except RayActorError:
                time.sleep(0.3)


def start(run, tmp_path, slow=None, dropped=(), **options):
    policies = tuple(list_hospitals(run))
    folder = RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})}))
    pool = Disturbed(RayPool(hospital_specs(run, policies, folder.path), folder.job, **options), slow, dropped)
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    folder.closed_after = pool.closed_after
    return outcome, folder


def run_of(num_hospitals=3, **federation):
    return small_run(
        data={"phantom": {"num_hospitals": num_hospitals, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}},
        federation={
            "deadline_s": DEADLINE_S,
            "local_steps": 1,
            "retries": 0,
            "max_hospital_failures": 50,
            **federation,
        },
    )


def test_with_dropouts_and_a_straggler_every_round_closes_within_its_deadline(ray_cluster, tmp_path):
    run = run_of(7, rounds=4, deadline_s=LONG_S)
    names = [policy.hospital for policy in list_hospitals(run)]
    straggler = names.pop()
    dropped = {(names[(2 * number + i) % 6], number) for number in range(1, 5) for i in range(2)}
    slow = {(straggler, 1): 3 * LONG_S}
    outcome, folder = start(run, tmp_path, slow, dropped)
    assert outcome.completed
    for receipt in folder.receipts():
        assert receipt.published
        reasons = {failure.hospital: failure for failure in receipt.failures}
        assert {*receipt.trained, *reasons} == {*receipt.asked}
        assert {name for name, number in dropped if number == receipt.round} <= set(reasons)
    assert len(folder.closed_after) == 4
    assert max(folder.closed_after) < LONG_S + 1
    first, second, *_ = folder.receipts()
    assert next(failure.stage for failure in first.failures if failure.hospital == straggler) == "late"
    busy = next(failure for failure in second.failures if failure.hospital == straggler)
    assert (busy.stage, "still training for round 1" in busy.reason) == ("reserve", True)


def test_a_late_update_is_counted_in_the_next_round(ray_cluster, tmp_path):
    run = run_of(rounds=2, stragglers="keep")
    names = sorted(policy.hospital for policy in list_hospitals(run))
    outcome, folder = start(run, tmp_path, {(names[0], 1): DEADLINE_S + 1, (names[1], 2): 9.0}, keeps_late=True)
    first, second = folder.receipts()
    assert outcome.completed
    assert [(f.hospital, f.stage) for f in first.failures if f.stage != "evaluate"] == [(names[0], "late")]
    assert second.late == {names[0]: 1}
    assert outcome.absent == ()


def test_a_process_that_hangs_is_ended_and_started_anew(ray_cluster, tmp_path, monkeypatch):
    import actors.ray_pool

    monkeypatch.setattr(actors.ray_pool, "PATIENCE", 1)
    monkeypatch.setattr(actors.ray_pool, "SHORT_S", 1.0)
    run = run_of(2, rounds=8, min_clients=1)
    names = sorted(policy.hospital for policy in list_hospitals(run))
    slow = {(names[0], 1): 10_000} | {(names[1], number): 8 for number in range(2, 8)}
    outcome, folder = start(run, tmp_path, slow)
    assert outcome.completed
    assert folder.receipts()[0].trained == (names[1],)
    assert any(names[0] in receipt.trained for receipt in folder.receipts())


def test_below_quorum_nothing_is_published_and_the_run_says_so(ray_cluster, tmp_path):
    run = run_of(3, rounds=2, min_clients=3, max_failed_rounds=1)
    names = sorted(policy.hospital for policy in list_hospitals(run))
    outcome, folder = start(run, tmp_path, dropped={(names[0], 1), (names[1], 1)})
    assert not outcome.completed
    assert "2 of 3" in outcome.reason or "1 of 3" in outcome.reason
    assert not any(receipt.published for receipt in folder.receipts())
    assert not (folder.path / "checkpoints").exists()
