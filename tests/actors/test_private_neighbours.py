"""Whatever pool asks a hospital with private data: of two neighbouring folders it hears the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from loop_grid import LoopGrid
from neighbours import LAYOUTS, neighbours
from oracle_game import plain

from actors.flower.app import GridLink
from actors.flower.pool import FlowerPool
from actors.ray_pool import RayPool
from actors.simulation.pool import check_simulation
from medfl_ray.assembly.run import hospital_specs, local_pool
from medfl_ray.config.files import load_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import RoundPlan
from medfl_ray.store.run.folder import RunFolder

PAIRS = [LAYOUTS.index("dicom seg"), 20 + LAYOUTS.index("csv png")]


def heard(run, pool_kind, folder: Path) -> str:
    """Return all that a pool hears of the run's hospital before and around its training."""
    output = run.output.model_copy(update={"directory": folder / "runs", "state_directory": folder / "state"})
    run = run.model_copy(update={"output": output})
    policies, store = tuple(list_hospitals(run)), RunFolder.create(run)
    specs = hospital_specs(run, policies, store.path, folder / "state")
    pool = pool_kind(run, policies, specs, store, folder)
    try:
        answers = [*pool.describe()]
        plan = RoundPlan(
            job=store.job,
            round=1,
            attempt=1,
            config_hash=run.config_hash,
            weights_checksum="",
            hospitals=("a",),
            num_steps={"a": 1},
            learning_rate=0.01,
            mechanisms={"a": mechanism_for(run, policies[0])},
        )
        answers.append(pool.reserve(plan))
        size = _num_parameters(run)
        for weights in (np.zeros(size, np.float32), np.full(size, np.nan, np.float32)):
            answers += [*pool.evaluate(1, ("a",), weights, False, None), *pool.evaluate(2, ("a",), weights, True, None)]
        answers.append([plain(answer) for answer in pool.train(plan, ("a",), np.zeros(size, np.float32))])
        answers.append(pool.export_ledgers())
    finally:
        pool.close()
    return json.dumps(plain(answers), sort_keys=True, default=str).replace(store.job, "JOB")


def _num_parameters(run) -> int:
    from medfl_ray.assembly.run import initial_weights

    return int(initial_weights(run)(1, 2)[0].size)


def in_this_process(run, policies, specs, store, folder):
    return local_pool(specs)


def on_ray(run, policies, specs, store, folder):
    return RayPool(specs, store.job)


def over_flower(run, policies, specs, store, folder):
    from actors.flower.aggregation import identify

    identify()
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True)))
    assert load_run_config(file).config_hash == run.config_hash
    nodes = {1: {"hospital": "a", "run": str(file)}}
    return FlowerPool(GridLink(LoopGrid(nodes, {}, forgets=True)), run, policies, store.job, {}, 10)


@pytest.mark.parametrize("seed", PAIRS)
@pytest.mark.parametrize("pool", [in_this_process, on_ray, over_flower])
def test_hole_every_pool_hears_the_same_of_neighbouring_folders(tmp_path, request, pool, seed):
    if pool is on_ray:
        request.getfixturevalue("ray_cluster")
    pair = neighbours(tmp_path / "pair", seed)
    one, two = (heard(run, pool, tmp_path / str(number)) for number, run in enumerate(pair.runs))
    assert "suppressed" in one
    assert "epsilon" in one
    assert one == two


@pytest.mark.parametrize("seed", PAIRS)
def test_a_simulation_takes_no_private_folder(tmp_path, seed):
    for run in neighbours(tmp_path, seed).runs:
        with pytest.raises(ConfigError, match="keeps no account"):
            check_simulation(run, list_hospitals(run))
