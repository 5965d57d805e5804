"""The recipes of CONTRIBUTING.md, followed: a strategy and a network that are added as they say are trained."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.numpy import load_file
from small_runs import balls
from torch import nn

from medfl_ray.aggregation.interface import Next, ServerState, Strategy
from medfl_ray.aggregation.strategies import SERVER_STRATEGIES
from medfl_ray.assembly.run import hospital_specs, initial_weights, local_pool, run_in_process
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.config.model import ModelConfig
from medfl_ray.config.run import RunConfig
from medfl_ray.config.strategies import STRATEGIES, StrategyTraits
from medfl_ray.data.sources import list_hospitals
from medfl_ray.models.catalogue import CATALOGUE, Entry, build_network
from medfl_ray.models.networks import NetworkArguments
from medfl_ray.params import Vector, load_into
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.training.rules.client_rules import (
    CLIENT_RULES,
    ClientRule,
    RuleInput,
    RuleResult,
    RuleSteps,
    TrainingPass,
)

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def one_more_name(section: type[BaseModel], field: str, name: str) -> Iterator[None]:
    """Let the schema accept one more name, as a line more in the Literal of its source does."""
    info = section.model_fields[field]
    known = info.annotation

    def accept(names: object) -> None:
        info.annotation = names
        section.model_rebuild(force=True)
        RunConfig.model_rebuild(force=True)

    accept(Literal[(*get_args(known), name)])
    try:
        yield
    finally:
        accept(known)


@pytest.fixture
def add_name() -> Iterator[Callable[[type[BaseModel], str, str], None]]:
    with ExitStack() as stack:
        yield lambda section, field, name: stack.enter_context(one_more_name(section, field, name))


def tiny(**sections: object) -> RunConfig:
    phantom = {"preset": "balls", "num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
    federation = {"rounds": 2, "local_epochs": None, "local_steps": 1, "pool": "local"}
    return balls(**{"data": {"phantom": phantom}, "federation": federation, **sections})


def trained(run: RunConfig, tmp_path: Path) -> Path:
    """Train a run through the local pool; return its folder."""
    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    assert outcome.completed
    assert [failure.reason for result in folder.results() for failure in result.receipt.failures] == []
    return folder.path


def half_step(config: AggregationConfig, num_hospitals: int) -> Strategy:
    """The server's function: half of the mean update, and a count of the rounds."""

    def init(size: int) -> ServerState:
        return {"toy_rounds": np.zeros(1, dtype=np.float32)}

    def apply(state: ServerState, weights: Vector, mean_update: Vector) -> Next:
        return {"toy_rounds": state["toy_rounds"] + 1}, weights + np.float32(0.5) * mean_update

    return Strategy(init, apply)


def constant_update(given: RuleInput) -> RuleSteps:
    """The hospital's function: train, but send a quarter of its place in the run, times the round it remembers."""
    outcome = yield TrainingPass(given.weights, given.job)
    rounds = given.remembered("rounds") + 1
    update = np.float32(0.25 * (given.index + 1)) * rounds
    return RuleResult(replace(outcome, delta=update), {"rounds": rounds})


def test_a_strategy_added_by_the_recipe_trains(monkeypatch, add_name, tmp_path):
    add_name(AggregationConfig, "strategy", "toy")
    monkeypatch.setitem(STRATEGIES, "toy", StrategyTraits(stateful=True, sum_suffices=True))
    monkeypatch.setitem(SERVER_STRATEGIES, "toy", half_step)
    monkeypatch.setitem(CLIENT_RULES, "toy", ClientRule(constant_update))

    run = tiny(aggregation={"strategy": "toy", "weighting": "uniform"})
    folder = trained(run, tmp_path)
    # Round 1: the mean of 0.25 and 0.5 is 0.375; round 2: of 0.5 and 1 it is 0.75. Half of both is 0.5625.
    _, first = initial_weights(run)(1, 2)
    final = np.concatenate([value.ravel() for _, value in in_order(folder, run)])
    assert final - first == pytest.approx(np.full(len(first), 0.5625), abs=1e-6)
    memories = sorted(folder.rglob("memory/*/round-00002.safetensors"))
    assert [np.unique(load_file(path)["rounds"]).tolist() for path in memories] == [[2.0], [2.0]]


def in_order(folder: Path, run: RunConfig) -> list[tuple[str, np.ndarray]]:
    """Return the tensors of the final model in the order of the layout."""
    layout, _ = initial_weights(run)(1, 2)
    model = load_file(folder / "model.safetensors")
    return [(name, model[name]) for name in layout.names]


def test_a_strategy_added_by_the_recipe_meets_privacy_only_once_its_row_says_so(monkeypatch, add_name):
    add_name(AggregationConfig, "strategy", "toy")
    privacy = {"enable_dp": True, "noise_multiplier": 1.0}
    monkeypatch.setitem(STRATEGIES, "toy", StrategyTraits(stateful=True, sum_suffices=True))
    with pytest.raises(ValueError, match="'toy' is not known to send only what the noise"):
        tiny(aggregation={"strategy": "toy"}, privacy=privacy)
    monkeypatch.setitem(STRATEGIES, "toy", StrategyTraits(stateful=True, sum_suffices=True, patient_dp_ok=True))
    assert tiny(aggregation={"strategy": "toy"}, privacy=privacy).privacy.patient_level


def test_a_name_that_was_not_added_is_refused():
    with pytest.raises(ValueError, match="input_value='toy'"):
        tiny(aggregation={"strategy": "toy"})


def pointwise(request: NetworkArguments) -> nn.Module:
    """The network: one convolution of a single pixel."""
    return nn.Conv2d(request.in_channels, request.out_channels, kernel_size=1)


def test_a_network_added_by_the_recipe_trains(monkeypatch, add_name, tmp_path):
    add_name(ModelConfig, "type", "toy")
    monkeypatch.setitem(CATALOGUE, "toy", Entry(pointwise, lambda levels: 1, min_levels=1, spatial_dims=(2,)))

    run = tiny(model={"type": "toy"})
    folder = trained(run, tmp_path)
    layout, first = initial_weights(run)(1, 2)
    assert dict(zip(layout.names, layout.shapes, strict=True)) == {"weight": (2, 1, 1, 1), "bias": (2,)}
    final = np.concatenate([value.ravel() for _, value in in_order(folder, run)])
    assert final.shape == first.shape == (4,)
    assert (final != first).all()

    network = build_network(run.model, 2, 1, 2, True, (16, 16))
    load_into(network, np.array([3, -1, 0.5, 0], dtype=np.float32))
    # Two channels of one pixel of 2: 3 * 2 + 0.5 and -1 * 2 + 0.
    assert network(torch.full((1, 1, 1, 1), 2.0)).flatten().tolist() == [6.5, -2.0]


def test_the_recipes_name_files_and_tables_that_exist():
    recipes = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Recipes")[2].partition("\n## ")[0]
    paths = re.findall(r"`([\w/]+\.(?:py|md|json))`", recipes)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    source = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths if path.endswith(".py"))
    tables = re.findall(r"`([A-Z][A-Z_]{3,})`", recipes)
    assert {"STRATEGIES", "SERVER_STRATEGIES", "CLIENT_RULES", "KEPT_BY_STRATEGY", "CATALOGUE"} <= set(tables)
    assert [table for table in tables if not re.search(rf"^{table}\b", source, re.MULTILINE)] == []
