"""Whole runs of every strategy in this process: what is shared, what stays, and the same bits after an interruption."""

import json
import math
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import Interfering, balls

from medfl_ray.assembly.run import hospital_specs, initial_weights, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import StorageError
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.params import norm
from medfl_ray.store.run.folder import RunFolder

EVERY = [
    "fednova",
    "qfedavg",
    "afl",
    "fedprox",
    "scaffold",
    "feddyn",
    "fedbn",
    "fedper",
    "fedrep",
    "ditto",
    "apfl",
]


def tiny(strategy, **changes):
    """Return two hospitals of a few small images and two rounds of two steps."""
    aggregation = {"strategy": strategy, **changes.pop("aggregation", {})}
    phantom = {"preset": "balls", "num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
    federation = {"local_epochs": None, "local_steps": 2, "pool": "local", **changes.pop("federation", {})}
    return balls(aggregation=aggregation, data={"phantom": phantom}, federation=federation, **changes)


def started(run, tmp_path, change=None, stop=None, folder=None):
    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path})
    folder = folder or RunFolder.create(run.model_copy(update={"output": output}))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    pool = Interfering(pool, change) if change else pool
    stop = stop or threading.Event()
    return run_in_process(run, policies, folder.path, pool, lambda event: None, stop), folder


def model_of(folder):
    return load_file(folder.path / "model.safetensors")


def remembered(folder, hospital, round):
    path = folder.path / "hospitals" / hospital / "memory" / folder.job / f"round-{round:05d}.safetensors"
    return load_file(path)


def scores(folder, name):
    final = json.loads((folder.path / "evaluation.json").read_text())
    return {hospital: one["metrics"][name]["value"] for hospital, one in final.items() if name in one["metrics"]}


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    return started(tiny("fedavg"), tmp_path_factory.mktemp("fedavg"))


@pytest.mark.parametrize("strategy", EVERY)
def test_two_hospitals_train_two_rounds(strategy, tmp_path, fedavg):
    outcome, folder = started(tiny(strategy), tmp_path)
    assert outcome.completed
    assert [len(result.receipt.trained) for result in folder.results()] == [2, 2]
    assert [f.reason for result in folder.results() for f in result.receipt.failures] == []
    # The own model of ditto and apfl is beside the shared one, which is that of fedavg.
    same = outcome.weights_checksum == fedavg[0].weights_checksum
    assert same == (strategy in ("ditto", "apfl"))
    assert all(math.isfinite(score) for score in scores(folder, "dice").values())
    assert len(scores(folder, "dice_shared")) == (2 if tiny(strategy).aggregation.is_personal else 0)


@pytest.mark.parametrize("strategy", ["fedbn", "fedper"])
def test_what_stays_in_a_hospital_is_never_moved_by_the_server(strategy, tmp_path):
    run = tiny(strategy)
    _, folder = started(run, tmp_path)
    layout, first = initial_weights(run)(1, 2)
    final, position = model_of(folder), 0
    unmoved = set()
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        size = math.prod(shape)
        if np.array_equal(final[name].ravel(), first[position : position + size]):
            unmoved.add(name)
        position += size
    own = [remembered(folder, policy.hospital, 2)["kept"] for policy in list_hospitals(run)]
    assert sum(final[name].size for name in unmoved) == own[0].size > 0
    assert len({name.rpartition(".")[0] for name in unmoved}) == (1 if strategy == "fedper" else 2)
    assert not np.array_equal(own[0], own[1])


@pytest.mark.parametrize("strategy", ["scaffold", "ditto", "fedbn", "feddyn"])
def test_a_stopped_run_resumes_to_the_same_bits(strategy, tmp_path):
    run = tiny(strategy, federation={"rounds": 3})
    whole, folder = started(run, tmp_path / "whole")
    stop = threading.Event()

    def stop_in_second_round(update):
        if update.round == 2:
            stop.set()
        yield update

    halted, resumed_folder = started(run, tmp_path / "halted", stop_in_second_round, stop)
    assert not halted.completed
    resumed, _ = started(run, tmp_path, folder=resumed_folder)
    assert resumed.weights_checksum == whole.weights_checksum
    assert scores(resumed_folder, "dice") == scores(folder, "dice")


@pytest.mark.parametrize("failpoint", ["round.update:2", "round.evaluated"])
def test_a_round_that_is_repeated_starts_from_the_same_memory(failpoint, tmp_path, monkeypatch):
    """All hospitals have trained and remember the round when the process ends; they train it again."""
    run = tiny("scaffold")
    whole, expected = started(run, tmp_path / "whole")
    monkeypatch.setenv("MEDFL_FAILPOINT", f"{failpoint}:{'' if ':' in failpoint else '1:'}enospc")
    output = run.output.model_copy(update={"directory": tmp_path})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    with pytest.raises((OSError, StorageError)):
        started(run, tmp_path, folder=folder)
    assert remembered(folder, "hospital-001", 1)["control"].any()
    monkeypatch.delenv("MEDFL_FAILPOINT")
    resumed, _ = started(run, tmp_path, folder=folder)
    assert resumed.weights_checksum == whole.weights_checksum
    for round in (1, 2):
        one, other = (remembered(which, "hospital-001", round)["control"] for which in (folder, expected))
        assert np.array_equal(one, other)


def private(strategy, **changes):
    privacy = {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": 0.5, "delta": 1e-5}
    return tiny(strategy, privacy=privacy, **changes)


def charges(folder):
    ledgers = json.loads((folder.path / "ledger.json").read_text())
    return {
        name: [(e["round"], e["num_steps"], e["noise_multiplier"]) for e in one["events"] if e["kind"] == "reserve"]
        for name, one in ledgers.items()
    }


SLOW = [pytest.param(strategy, marks=pytest.mark.ci) for strategy in ("fednova", "fedbn", "fedrep", "feddyn")]


@pytest.mark.parametrize("strategy", ["scaffold", "ditto", *SLOW])
def test_under_dp_a_strategy_is_charged_like_fedavg(strategy, tmp_path):
    outcome, folder = started(private(strategy), tmp_path)
    assert outcome.completed
    assert [len(result.receipt.trained) for result in folder.results()] == [2, 2]
    assert charges(folder) == {f"hospital-00{i}": [(1, 2, 1.0), (2, 2, 1.0)] for i in (1, 2)}


def test_fewer_steps_in_later_rounds_are_trained_and_charged(tmp_path):
    federation = {"rounds": 3, "local_steps": 3, "local_steps_schedule": "decay"}
    _, folder = started(private("fedavg", federation=federation), tmp_path)
    # 3 / sqrt(2) = 2.1, 3 / sqrt(3) = 1.7
    assert charges(folder)["hospital-001"] == [(1, 3, 1.0), (2, 3, 1.0), (3, 2, 1.0)]


def test_the_hospital_keeps_to_the_longest_update(tmp_path):
    seen = []

    def watch(update):
        seen.append(norm(update.delta))
        yield update

    outcome, _ = started(tiny("fedavg", aggregation={"max_update_norm": 1e-3}), tmp_path, watch)
    assert outcome.completed
    assert seen == pytest.approx([1e-3] * 4, rel=1e-5)


def test_a_hospital_that_the_strategy_cannot_be_for_does_not_start(tmp_path):
    run = tiny("fedper", aggregation={"local_parameters": ["decoder.*"]})
    policies = tuple(list_hospitals(run))
    pool = local_pool(hospital_specs(run, policies, tmp_path))
    assert isinstance(pool, LocalPool)
    failures = pool.describe()
    assert all("'decoder.*' matches no parameter" in failure.reason for failure in failures)
    assert all(failure.config_fault for failure in failures)


def test_baselines_of_a_strategy_are_those_of_fedavg(tmp_path):
    documents = []
    for strategy in ("fedavg", "fedbn"):
        run = tiny(strategy, federation={"baselines": ["local", "central"], "rounds": 1})
        _, folder = started(run, tmp_path / strategy)
        documents.append(json.loads((folder.path / "baselines.json").read_text()))
    assert documents[0] == documents[1]
    assert documents[0]["central"]
