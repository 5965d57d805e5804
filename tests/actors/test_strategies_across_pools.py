"""Strategies of which hospitals remember something: the same bits in one process, on Ray actors and in simulations."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import balls

from actors.ray_pool import RayPool
from actors.simulation.pool import VirtualPool
from actors.simulation.run import Simulation, simulate
from actors.simulation.work import Memories
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError
from medfl_ray.store.run.folder import RunFolder

pytestmark = pytest.mark.timeout(300)


def run_of(strategy, **federation):
    phantom = {"preset": "balls", "num_hospitals": 3, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
    return balls(
        aggregation={"strategy": strategy},
        data={"phantom": phantom},
        federation={"local_epochs": None, "local_steps": 2, "num_actors": 2, **federation},
    )


def folder_of(run, tmp_path):
    output = run.output.model_copy(update={"directory": tmp_path})
    return RunFolder.create(run.model_copy(update={"output": output}))


def on_pool(run, tmp_path, num_actors=None):
    """Run on the local pool, or on Ray actors where a number of them is given."""
    policies, folder = tuple(list_hospitals(run)), folder_of(run, tmp_path)
    specs = hospital_specs(run, policies, folder.path)
    pool = local_pool(specs) if num_actors is None else RayPool(specs, folder.job, num_actors)
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return outcome, folder


def simulated(run, tmp_path):
    folder = folder_of(run, tmp_path)
    return simulate(folder.run, tuple(list_hospitals(run)), folder.path, lambda event: None), folder


def memories(folder):
    """Return what every hospital remembers after the last round."""
    found = sorted((folder.path / "hospitals").glob("*/memory/*/round-00002.safetensors"))
    return [next(iter(load_file(path).values())) for path in found]


def dice(folder):
    final = json.loads((folder.path / "evaluation.json").read_text())
    return {hospital: one["metrics"]["dice"]["value"] for hospital, one in final.items()}


@pytest.fixture(scope="module", params=["scaffold", "ditto"])
def in_one_process(request, tmp_path_factory):
    return request.param, *on_pool(run_of(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("num_actors", [pytest.param(1, marks=pytest.mark.ci), 2])
def test_ray_actors_give_the_same_bits(ray_cluster, in_one_process, tmp_path, num_actors):
    strategy, expected, folder = in_one_process
    found, own_folder = on_pool(run_of(strategy), tmp_path, num_actors)
    assert found.weights_checksum == expected.weights_checksum
    assert len(memories(folder)) == 3
    for one, other in zip(memories(folder), memories(own_folder), strict=True):
        assert np.array_equal(one, other)
    assert dice(folder) == dice(own_folder)


@pytest.mark.ci
@pytest.mark.parametrize("exact", [True, False])
def test_a_simulation_gives_the_same_bits_exact_and_the_same_numbers_in_groups(
    ray_cluster, in_one_process, tmp_path, exact
):
    strategy, expected, folder = in_one_process
    if exact:
        expected, folder = on_pool(run_of(strategy, exact=True), tmp_path / "one_process")
    found, own_folder = simulated(run_of(strategy, exact=exact), tmp_path)
    assert found.completed
    if exact:
        assert found.weights_checksum == expected.weights_checksum
        assert dice(folder) == dice(own_folder)
    for one, other in zip(memories(folder), memories(own_folder), strict=True):
        assert np.array_equal(one, other) or not exact
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.ci
def test_a_warm_up_leaves_no_memory(ray_cluster, tmp_path):
    run = run_of("scaffold", exact=True)
    policies, folder = tuple(list_hospitals(run)), folder_of(run, tmp_path / "warm")
    with Simulation(run, policies, folder.path, lambda event: None) as simulation:
        simulation.warm_up([policy.hospital for policy in policies])
        assert not list(folder.path.rglob("*.safetensors"))


def test_hospitals_that_remember_something_are_not_simulated_on_several_nodes(ray_cluster, monkeypatch, tmp_path):
    import ray

    run, memories = run_of("ditto"), Memories(tmp_path)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    with pytest.raises(ConfigError, match=r"'ditto' has every hospital remember something.*a cluster of one node"):
        VirtualPool(run, list_hospitals(run), memories=memories)
