"""How many patients go through the network at once is measured when a run is made, and reused when it is resumed."""

import json
import threading

import pytest
from small_runs import small_run

from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.training.gradients import engine_choice

DP = {"enable_dp": True, "noise_multiplier": 2.0, "sample_rate": 0.5}


@pytest.fixture
def timed(monkeypatch):
    """Let groups of four look fastest, and count what is timed."""
    calls = []

    def seconds(engine, patients):
        size = getattr(engine, "_group_size", 1)
        calls.append(size)
        return len(patients) * {1: 1.0, 2: 0.8, 4: 0.5, 8: 0.5}[size]

    monkeypatch.setattr(engine_choice, "_seconds", seconds)
    return calls


def go_on(folder, until=None):
    """Run a folder's run until a round is closed, or to its end."""
    run, stop = folder.run, threading.Event()
    policies = tuple(list_hospitals(run))

    def watch(event):
        if event.type == "round" and event.result.round == until:
            stop.set()

    pool = local_pool(hospital_specs(run, policies, folder.path))
    return run_in_process(run, policies, folder.path, pool, watch, stop)


def created(tmp_path, **sections):
    sections.setdefault("training", {"patient_group_size": None})
    run = small_run(federation={"rounds": 2, "local_steps": 1}, **sections)
    return RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})}))


def test_a_resumed_run_reuses_what_was_measured(tmp_path, timed):
    folder = created(tmp_path, privacy=DP)
    names = [policy.hospital for policy in list_hospitals(folder.run)]
    assert not go_on(folder, until=1).completed
    assert timed == [1, 2, 4, 8] * len(names)
    resumed = RunFolder.open(folder.path)
    assert resumed.run.training.measured_group_sizes == dict.fromkeys(names, 4)
    assert resumed.run.config_hash == folder.run.config_hash
    infos = json.loads((folder.path / "hospitals.json").read_text())
    assert {name: info["patient_group_size"] for name, info in infos.items()} == dict.fromkeys(names, 4)

    timed.clear()
    assert go_on(resumed).completed
    assert timed == []


def test_a_configured_size_is_not_measured(tmp_path, timed):
    folder = created(tmp_path, privacy=DP, training={"patient_group_size": 2})
    assert go_on(folder).completed
    assert timed == []
    assert set(RunFolder.open(folder.path).run.training.measured_group_sizes.values()) == {2}


def test_without_private_steps_nothing_is_measured(tmp_path, timed):
    folder = created(tmp_path)
    before = (folder.path / "config.yaml").read_text()
    assert go_on(folder).completed
    assert timed == []
    assert (folder.path / "config.yaml").read_text() == before
