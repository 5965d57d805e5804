"""A ledger that lost what the coordinator has seen does not train until it is charged again, in whole runs."""

import dataclasses
import shutil
import sqlite3
import threading
from functools import partial
from pathlib import Path

import pytest
from private_hospitals import two_private_hospitals
from small_runs import small_run

from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.run import RunExtras, hospital_specs, local_pool, run_in_process
from medfl_ray.cli.privacy_ledger import accept_key, recover
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.file import KEY_NAME
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.mirror_file import MIRROR_NAME
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.signing_key import load_key

MECHANISM = Mechanism(
    noise_multiplier=1.0, sample_rate=0.5, max_grad_norm=1.0, num_steps=4, num_patients=20, delta=1e-5
)


def start(tmp_path, rounds=1, pool_of=local_pool, folder=None):
    run, policies = two_private_hospitals(rounds)
    output = run.output.model_copy(update={"directory": tmp_path / "runs"})
    folder = folder or RunFolder.create(run.model_copy(update={"output": output}))
    root = tmp_path / "state"
    pool = pool_of(hospital_specs(run, policies, folder.path, root))
    outcome = run_in_process(
        run, policies, folder.path, pool, lambda event: None, threading.Event(), RunExtras(root=root)
    )
    return outcome, folder


def names():
    return [policy.hospital for policy in two_private_hospitals()[1]]


def truncate(site, backup):
    connection = sqlite3.connect(site / "ledger.sqlite")
    connection.execute("DROP TRIGGER ledger_events_no_delete")
    connection.execute("DELETE FROM ledger_events WHERE sequence > 2")
    connection.commit()
    connection.close()


def delete(site, backup):
    for path in site.glob("ledger.sqlite*"):
        path.unlink()


def restore_backup(site, backup):
    shutil.rmtree(site)
    shutil.copytree(backup, site)


def move_to_another_node(site, backup):
    shutil.rmtree(site)


SLOW = [pytest.param(hurt, marks=pytest.mark.ci) for hurt in (restore_backup, move_to_another_node)]


@pytest.mark.parametrize("hurt", [truncate, delete, *SLOW])
def test_a_ledger_that_lost_rows_blocks_until_it_is_recovered(tmp_path, hurt):
    hospital, other = names()
    state = tmp_path / "state"
    start(tmp_path)
    shutil.copytree(state / hospital, tmp_path / "backup")
    start(tmp_path)
    hurt(state / hospital, tmp_path / "backup")

    outcome, folder = start(tmp_path)
    assert outcome.absent == (hospital,)
    assert folder.results()[0].receipt.trained == (other,)
    (failure,) = [f for f in _failures(folder) if f["hospital"] == hospital]
    assert "medfl-ray privacy ledger recover" in failure["reason"]
    assert failure["left_host"] is False

    recover(hospital=hospital, state=state / hospital, mirror=[state / "_mirror"])
    num_starts = 4
    if hurt is move_to_another_node:  # its key is gone too: another one takes the word of the coordinator's operator
        outcome, folder = start(tmp_path)
        assert outcome.absent == (hospital,)
        (failure,) = [f for f in _failures(folder) if f["hospital"] == hospital]
        assert "accept-key" in failure["reason"]
        new_key = load_key(state / hospital / KEY_NAME).public_key
        accept_key(hospital=hospital, data_set="dataset", key=new_key, mirror=state / "_mirror")
        num_starts = 5
    outcome, folder = start(tmp_path)
    assert outcome.absent == ()
    receipt = folder.results()[0].receipt
    assert receipt.spent[hospital].epsilon == pytest.approx(_epsilon_of(3), rel=1e-6)
    assert receipt.spent[other].epsilon == pytest.approx(_epsilon_of(num_starts), rel=1e-6)


def _epsilon_of(num_steps):
    from medfl_ray.privacy.accountant import Segment, epsilon_spent

    return epsilon_spent([Segment(30.0, 0.5, num_steps)], 1e-5)


def _failures(folder):
    import json

    return json.loads((folder.path / "failures.json").read_text())


def test_a_ledger_lost_in_mid_run_stops_this_hospital_and_not_the_round(tmp_path):
    """Its process ends after round 1 and starts again on a node without its ledger."""
    hospital, other = names()

    class Restarted(LocalPool):
        def reserve(self, plan):
            if plan.round == 2:
                self._hospitals.pop(hospital)
                shutil.rmtree(tmp_path / "state" / hospital)
            return super().reserve(plan)

    def pool_of(specs):
        return Restarted({spec.policy.hospital: partial(build_hospital, spec) for spec in specs})

    outcome, folder = start(tmp_path, rounds=2, pool_of=pool_of)
    assert outcome.completed
    second = folder.results()[1].receipt
    assert second.trained == (other,)
    assert "medfl-ray privacy ledger recover" in second.failures[0].reason


def test_the_mirror_has_each_reservation_before_anybody_trains(tmp_path):
    seen = {}

    class Watching(LocalPool):
        def train(self, plan, hospitals, weights):
            copies = LedgerMirror(tmp_path / "state" / "_mirror")
            seen[plan.round] = {h: [row["kind"] for row in copies.export(h, "dataset")["events"]] for h in hospitals}
            return super().train(plan, hospitals, weights)

    def pool_of(specs):
        return Watching({spec.policy.hospital: partial(build_hospital, spec) for spec in specs})

    _, folder = start(tmp_path, rounds=2, pool_of=pool_of)
    assert seen == {
        1: {name: ["reserve"] for name in names()},
        2: {name: ["reserve", "settle", "reserve"] for name in names()},
    }
    copies = LedgerMirror(tmp_path / "state" / "_mirror")
    head = folder.results()[1].receipt.spent[names()[0]].ledger_head
    assert str(copies.head(names()[0], "dataset")) == head
    assert '"events"' not in (folder.path / "receipts.jsonl").read_text()
    assert not (folder.path / "mirror").exists()


def test_rows_that_do_not_follow_are_not_trained_under_and_their_charge_is_given_back(tmp_path):
    hospital, other = names()

    class Forging(LocalPool):
        def reserve(self, plan):
            answers = dict(super().reserve(plan))
            (rows,) = answers[hospital].ledger_rows
            bad = rows.model_copy(update={"events": ({**rows.events[0], "num_steps": 1000},)})
            answers[hospital] = answers[hospital].model_copy(update={"ledger_rows": (bad,)})
            return answers

    def pool_of(specs):
        return Forging({spec.policy.hospital: partial(build_hospital, spec) for spec in specs})

    _, folder = start(tmp_path, pool_of=pool_of)
    receipt = folder.results()[0].receipt
    assert receipt.trained == (other,)
    assert "row 1" in receipt.failures[0].reason


@pytest.mark.parametrize("stage", ["reserve", "train"])
def test_hole_rows_of_another_hospital_are_not_taken_and_its_sender_takes_no_part(tmp_path, stage):
    """One hospital's answer carries rows of the other's account, with a key of its own."""
    hospital, other = names()
    (tmp_path / "evil").mkdir(mode=0o700)
    evil = PrivacyLedger.open(tmp_path / "evil" / "ledger.sqlite", other, "dataset", 1e-5, None)
    evil.reserve("x", 1, 1, MECHANISM, None)
    (foreign,) = evil.rows_after({})

    def with_foreign(spent):
        return spent.model_copy(update={"ledger_rows": (*spent.ledger_rows, foreign)})

    class Lying(LocalPool):
        def reserve(self, plan):
            answers = dict(super().reserve(plan))
            if stage == "reserve":
                answers[hospital] = with_foreign(answers[hospital])
            return answers

        def train(self, plan, hospitals, weights):
            for answer in super().train(plan, hospitals, weights):
                lies = stage == "train" and answer.hospital == hospital
                yield dataclasses.replace(answer, spent=with_foreign(answer.spent)) if lies else answer

    def pool_of(specs):
        return Lying({spec.policy.hospital: partial(build_hospital, spec) for spec in specs})

    outcome, folder = start(tmp_path, rounds=2, pool_of=pool_of)
    assert outcome.completed
    for result in folder.results():
        assert result.receipt.trained == (other,)
        assert f"rows of the ledger of {other}" in next(f.reason for f in result.receipt.failures)
    copies = LedgerMirror(tmp_path / "state" / "_mirror").export(other, "dataset")["events"]
    assert {row["job"] for row in copies} == {folder.job}


def test_hole_a_hospital_that_shows_another_key_takes_no_part(tmp_path):
    hospital, other = names()
    start(tmp_path)
    shutil.rmtree(tmp_path / "state" / hospital)
    outcome, folder = start(tmp_path)
    assert outcome.absent == (hospital,)
    assert folder.results()[0].receipt.trained == (other,)


def test_a_synthetic_run_keeps_its_mirror_inside_its_folder(tmp_path):
    run = small_run(
        privacy={"enable_dp": True, "noise_multiplier": 30.0, "sample_rate": 0.5},
        federation={"rounds": 1, "local_steps": 1, "baselines": ["local", "central"]},
    )
    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path / "runs"})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    pool = local_pool(hospital_specs(run, policies, folder.path, tmp_path / "state"))
    extras = RunExtras(root=tmp_path / "state")
    run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event(), extras)
    assert not (tmp_path / "state").exists()
    copies = LedgerMirror(folder.path / "mirror")
    for policy in policies:
        jobs = [row["job"] for row in copies.export(policy.hospital, policy.data_set)["events"]]
        assert jobs == [job for job in (folder.job, f"{folder.job}/local", f"{folder.job}/central") for _ in range(2)]
    assert '"ledger_rows": []' in (folder.path / "baselines.json").read_text()


def test_without_dp_there_is_no_mirror(tmp_path):
    run = small_run(federation={"rounds": 1, "local_steps": 1})
    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path / "runs"})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    specs = hospital_specs(run, policies, folder.path)
    run_in_process(run, policies, folder.path, local_pool(specs), lambda event: None, threading.Event())
    assert not list(tmp_path.rglob(MIRROR_NAME))


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_relative_state_folder_is_made_absolute_where_the_run_starts(tmp_path, monkeypatch, by_variable):
    """A worker has another working directory and another environment; it gets the finished path."""
    run, policies = two_private_hospitals()
    if by_variable:
        monkeypatch.setenv("MEDFL_STATE_DIR", "states")
    else:
        run = run.model_copy(update={"output": run.output.model_copy(update={"state_directory": Path("states")})})
    monkeypatch.chdir(tmp_path)
    specs = hospital_specs(run, policies, Path("run"))
    root = tmp_path / "states" / "medfl-ray" if by_variable else tmp_path / "states"
    assert [spec.state_folder for spec in specs] == [root / name for name in names()]
