"""One round and one run in this process, with phantom hospitals and real training."""

import json
import threading

import pytest
from small_runs import Interfering, small_run

from medfl_ray import params
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, QuorumLost, StorageError
from medfl_ray.messages import ClientFailure, ClientUpdate
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts


def start(run, tmp_path, change=None, stop=None, folder=None):
    policies = tuple(list_hospitals(run))
    folder = folder or RunFolder.create(
        run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})})
    )
    pool = local_pool(hospital_specs(run, policies, folder.path))
    events = []
    outcome = run_in_process(
        run,
        policies,
        folder.path,
        Interfering(pool, change) if change else pool,
        events.append,
        stop or threading.Event(),
    )
    return outcome, folder, events


def copy_of(update, **changes):
    values = {name: getattr(update, name) for name in update.__dataclass_fields__}
    return ClientUpdate(**{**values, **changes})


def test_a_run_trains_and_leaves_everything_behind(tmp_path):
    outcome, folder, events = start(small_run(federation={"baselines": ["local", "central"]}), tmp_path)
    assert outcome.completed
    assert outcome.absent == ()
    results = folder.results()
    assert [r.round for r in results] == [1, 2]
    assert all(len(r.receipt.trained) == 3 and r.receipt.published for r in results)
    assert results[0].receipt.weights_after == results[1].receipt.weights_before
    for name in (
        "model.safetensors",
        "evaluation.json",
        "baselines.json",
        "ledger.json",
        "hospitals.json",
        "receipts.jsonl",
    ):
        assert (folder.path / name).is_file(), name
    assert list((folder.path / "pictures").glob("*.png"))
    assert {event.type for event in events} >= {"phase", "hospital", "round", "baseline"}


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    run = small_run(federation={"rounds": 3})
    whole, _, _ = start(run, tmp_path / "whole")
    stop = threading.Event()

    def stop_in_second_round(update):
        if update.round == 2:
            stop.set()
        yield update

    halted, folder, _ = start(run, tmp_path / "halted", stop_in_second_round, stop)
    assert not halted.completed
    assert (halted.rounds_done, halted.ending) == (2, "stopped")
    resumed, _, _ = start(run, tmp_path, folder=folder)
    assert resumed.completed
    assert resumed.weights_checksum == whole.weights_checksum
    assert [r.round for r in folder.results()] == [1, 2, 3]


def test_a_duplicate_is_applied_once(tmp_path):
    def thrice(update):
        yield update
        yield update
        yield update

    honest, _, _ = start(small_run(), tmp_path / "a")
    doubled, folder, _ = start(small_run(), tmp_path / "b", thrice)
    assert doubled.weights_checksum == honest.weights_checksum
    assert "already delivered" in folder.results()[0].receipt.failures[0].reason


def test_a_duplicate_is_charged_once(tmp_path):
    def thrice(update):
        yield update
        yield update
        yield update

    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5})
    _, folder, _ = start(run, tmp_path, thrice)
    for export in json.loads((folder.path / "ledger.json").read_text()).values():
        assert [(event["kind"], event["round"]) for event in export["events"]] == [
            ("reserve", 1), ("settle", 1), ("reserve", 2), ("settle", 2)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("failpoint", "state", "delivered"),
    [
        ("round.reserved", "being planned", 0),
        ("round.update:2", "collecting updates", 2),
        ("round.evaluated", "being published", 3),
        ("checkpoint.renamed", None, 3),
        ("record.metrics", None, 3),
    ],
)
def test_an_interrupted_round_is_closed_with_a_receipt_and_said(tmp_path, monkeypatch, failpoint, state, delivered):
    """The process's end is an OSError here; kills of real processes are in tests/chaos."""
    name, _, count = failpoint.partition(":")
    monkeypatch.setenv("MEDFL_FAILPOINT", f"{name}:{count or 1}:enospc")
    run = small_run(output={"directory": tmp_path})
    folder = RunFolder.create(run)
    with pytest.raises((OSError, StorageError)):
        start(run, tmp_path, folder=folder)
    monkeypatch.delenv("MEDFL_FAILPOINT")
    outcome, _, events = start(run, tmp_path, folder=folder)
    whole, _, _ = start(small_run(), tmp_path / "whole")
    assert outcome.weights_checksum == whole.weights_checksum
    receipts, unreadable = read_receipts(folder.path / "receipts.jsonl")
    verify_receipts(receipts)
    assert unreadable == []
    assert [r.receipt.model_dump() for r in folder.results()] == [
        r.model_dump(exclude={"previous", "public_key", "signature"}) for r in receipts
    ]
    notes = [event.message for event in events if event.type == "notice"]
    if state is None:
        assert [(r.round, r.published) for r in receipts] == [(1, True), (2, True)]
        assert notes == []
    else:
        assert [(r.round, r.attempt, r.published) for r in receipts] == [(1, 1, False), (1, 2, True), (2, 2, True)]
        assert state in receipts[0].reason
        assert len(receipts[0].trained) == delivered
        assert f"{delivered} updates had arrived" in notes[0]
        assert state in notes[0]


def test_below_quorum_nothing_is_published_and_the_run_says_so(tmp_path):
    def lose(update):
        yield ClientFailure(
            hospital=update.hospital, round=update.round, attempt=update.attempt, stage="train", reason="lost"
        )

    outcome, folder, _ = start(small_run(federation={"max_failed_rounds": 1}), tmp_path, lose)
    assert not outcome.completed
    assert outcome.ending == "quorum_lost"
    assert outcome.rounds_done == 0
    assert "min_clients" in outcome.reason
    assert len(outcome.absent) == 3
    results = folder.results()
    assert [r.receipt.published for r in results] == [False, False]
    assert results[0].receipt.attempt != results[1].receipt.attempt
    assert not (folder.path / "checkpoints").exists()


def test_too_few_hospitals_do_not_start(tmp_path):
    with pytest.raises(QuorumLost, match="min_available_clients"):
        start(small_run(federation={"min_available_clients": 9}), tmp_path)


def test_under_dp_every_round_is_charged_and_no_budget_is_exceeded(tmp_path):
    run = small_run(
        privacy={"enable_dp": True, "epsilon": 4.0, "sample_rate": 0.5},
        federation={"rounds": 3, "baselines": ["local"]},
    )
    outcome, folder, _ = start(run, tmp_path)
    assert outcome.completed
    spent = [r.receipt.spent for r in folder.results()]
    for hospital in spent[0]:
        epsilons = [s[hospital].epsilon for s in spent]
        assert epsilons == sorted(epsilons)
        assert 3.8 <= epsilons[-1] <= 4.0
        assert spent[0][hospital].unit == "patient"
    two, _, _ = start(run, tmp_path / "again")
    assert two.weights_checksum != outcome.weights_checksum


def test_the_central_baseline_is_refused_for_separate_private_data(tmp_path):
    from medfl_ray.config.site import SitePolicy
    from medfl_ray.federation.studies.baselines import check_baselines

    run = small_run(federation={"baselines": ["central"]})
    private = [SitePolicy(hospital="a", data_set="d", declared="private", num_patients=10)]
    with pytest.raises(ConfigError, match="pool the private data of a"):
        check_baselines(run, private)


def test_no_hospital_may_have_the_name_of_the_central_baseline():
    from medfl_ray.config.site import SitePolicy
    from medfl_ray.federation.studies.baselines import check_baselines

    with pytest.raises(ConfigError, match="rename it"):
        check_baselines(small_run(), [SitePolicy(hospital="central", data_set="d", num_patients=10)])


def test_the_central_baseline_is_charged_to_every_hospital(tmp_path):
    run = small_run(
        privacy={"enable_dp": True, "noise_multiplier": 2.0, "sample_rate": 0.5},
        federation={"rounds": 1, "baselines": ["central"]},
    )
    outcome, folder, _ = start(run, tmp_path)
    assert outcome.completed
    ledgers = {name: ledger for name, ledger in json.loads((folder.path / "ledger.json").read_text()).items() if ledger}
    assert set(ledgers) == set(folder.results()[0].receipt.trained)
    for ledger in ledgers.values():
        steps = {event["job"]: event["num_steps"] for event in ledger["events"] if event["kind"] == "reserve"}
        assert steps == {folder.job: 2, f"{folder.job}/central": 6}


def test_the_mean_is_weighted_by_public_patients(tmp_path):
    seen = {}

    def watch(update):
        seen[update.hospital] = update
        yield update

    _, folder, _ = start(small_run(federation={"rounds": 1}), tmp_path, watch)
    assert set(folder.results()[0].receipt.update_hashes) == set(seen)
    assert all(params.checksum(u.delta) == folder.results()[0].receipt.update_hashes[h] for h, u in seen.items())
    assert len({u.aggregation_weight for u in seen.values()}) == 1
