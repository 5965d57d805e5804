"""Ray actors give the same bits as one process, whatever their number, and their loss is reported."""

import threading

import pytest
from small_runs import small_run

from actors.ray_pool import RayPool, assign_to_actors
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder


def parts_of(run, tmp_path):
    policies = tuple(list_hospitals(run))
    folder = RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})}))
    return policies, folder, hospital_specs(run, policies, folder.path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    run = small_run(data={"phantom": {"num_hospitals": 4, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}})
    policies, folder, specs = parts_of(run, tmp_path_factory.mktemp("local"))
    outcome = run_in_process(run, policies, folder.path, local_pool(specs), lambda event: None, threading.Event())
    return run, outcome


@pytest.mark.parametrize(
    "num_actors", [pytest.param(1, marks=pytest.mark.ci), 2, pytest.param(4, marks=pytest.mark.ci)]
)
def test_same_weights_with_any_number_of_actors(ray_cluster, reference, tmp_path, num_actors):
    run, expected = reference
    policies, folder, specs = parts_of(run, tmp_path)
    pool = RayPool(specs, folder.job, num_actors)
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    assert outcome.weights_checksum == expected.weights_checksum


def test_a_killed_hospital_is_a_failure_with_a_reason_and_returns_for_the_next_round(ray_cluster, tmp_path):
    import os
    import signal

    import ray

    run = small_run(federation={"rounds": 2, "min_clients": 2})
    policies, folder, specs = parts_of(run, tmp_path)
    pool = RayPool(specs, folder.job)
    killed = []

    def kill_first(event):
        if event.type == "hospital" and event.state == "training" and not killed:
            killed.append(event.hospital)
            actor = pool._actors[event.hospital]
            os.kill(ray.get(actor.process_id.remote()), signal.SIGKILL)

    outcome = run_in_process(run, policies, folder.path, pool, kill_first, threading.Event())
    assert outcome.completed
    first, second = (r.receipt for r in folder.results())
    failures = [f for f in first.failures if f.stage == "train"]  # one more where the retry came before the restart
    assert {f.hospital for f in failures} == set(killed)
    assert all("process ended" in f.reason for f in failures)
    assert len(second.trained) == 3


def test_a_full_object_store_is_one_sentence(monkeypatch):
    import ray
    from ray.exceptions import ObjectStoreFullError

    from actors.ray_pool import put
    from medfl_ray.errors import ClusterError

    def full(value):
        raise ObjectStoreFullError

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(ClusterError, match=r"object store did not take the weights.*--resume"):
        put([1.0])


def test_hospitals_are_dealt_to_actors_in_turn():
    assert assign_to_actors(["a", "b", "c"], None) == [("a",), ("b",), ("c",)]
    assert assign_to_actors(["a", "b", "c"], 2) == [("a", "c"), ("b",)]
    assert assign_to_actors(["a"], 5) == [("a",)]


@pytest.mark.parametrize(("declared", "enable_dp"), [("private", True), ("public", True), ("synthetic", True)])
def test_on_two_nodes_only_pinned_hospitals_spend_from_a_lasting_ledger(monkeypatch, tmp_path, declared, enable_dp):
    import ray

    from medfl_ray.errors import ClusterError

    run = small_run(privacy={"enable_dp": enable_dp, "noise_multiplier": 1.0})
    policies = tuple(policy.model_copy(update={"declared": declared}) for policy in list_hospitals(run))
    specs = hospital_specs(run, policies, tmp_path / "run", tmp_path / "state")
    pin = {f"hospital:{specs[0].policy.hospital}": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": r} for r in (pin, {"CPU": 1.0})])
    if declared == "synthetic":
        assert RayPool(specs, "job")._actors == {}
    else:
        with pytest.raises(ClusterError, match="2 nodes") as caught:
            RayPool(specs, "job")
        assert specs[0].policy.hospital not in str(caught.value)
