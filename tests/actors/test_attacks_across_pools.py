"""Attacks and robust rules in simulations: the same weights as in one process."""

import threading

import pytest
from small_runs import balls

from actors.simulation.run import simulate
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder


def folder_of(run, directory):
    return RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": directory})}))


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_virtual_hospitals_and_one_process_agree_under_attack(ray_cluster, tmp_path):
    changes = {
        "aggregation": {"mode": "robust", "robust": {"rule": "norm_bound"}},
        "attack": {"kind": "alie", "hospitals": ["hospital-001"]},
    }
    run = balls(**changes, federation={"pool": "local", "exact": True})
    folder = folder_of(run, tmp_path / "local")
    policies = tuple(list_hospitals(folder.run))
    pool = local_pool(hospital_specs(folder.run, policies, folder.path))
    expected = run_in_process(folder.run, policies, folder.path, pool, lambda event: None, threading.Event())
    found = []
    for num_actors in (1, 2):
        run = balls(**changes, federation={"num_actors": num_actors, "exact": True})
        folder = folder_of(run, tmp_path / str(num_actors))
        outcome = simulate(folder.run, tuple(list_hospitals(run)), folder.path, lambda event: None)
        assert outcome.completed
        found.append(outcome.weights_checksum)
    assert set(found) == {expected.weights_checksum}
