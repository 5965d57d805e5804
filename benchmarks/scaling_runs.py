"""The runs that `scaling.py` measures: one network, as many hospitals as asked for, and the seconds of each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scaling_hospitals as hospitals

from actors.simulation.run import Simulation
from medfl_ray.config.run import RunConfig
from medfl_ray.federation.events import Event, PhaseStarted, RoundClosed, RoundTimed
from medfl_ray.store.run.folder import RunFolder

SMALL = (12, 24, 48, 96)


def configure(
    count: int, rounds: int, directory: Path, features: Sequence[int] = SMALL, **federation: Any
) -> RunConfig:
    """Return a run in which all of `count` hospitals train in every round."""
    return RunConfig.model_validate(
        {
            "name": "scaling",
            "data": {"phantom": {"num_hospitals": count}, "spatial_dims": 2},
            "model": {"type": "unet2d", "features": list(features)},
            "training": {
                "batch_size": 8,
                "learning_rate": 0.01,
                "optimizer": "sgd",
                "momentum": 0.0,
                "loss": "cross_entropy",
                "patch_size_voxels": hospitals.SIZE,
                "augment": False,
                "device": "cpu",
            },
            "federation": {
                "pool": "virtual",
                "rounds": rounds,
                "local_epochs": 1,
                "eval_every": rounds,
                "eval_hospitals": 1,
                **federation,
            },
            "privacy": {"enable_dp": False},
            "output": {"directory": str(directory), "report": False, "export": False},
        }
    )


def simulate(run: RunConfig, after_round: Callable[[Simulation, int], None] | None = None) -> list[float]:
    """Return the seconds of each round, from its plan to its receipt on the disk, evaluation left out; warm before."""
    seconds: list[float] = []
    began = 0.0
    policies = hospitals.policies(run.data.phantom.num_hospitals if run.data.phantom else 0)

    def follow(event: Event) -> None:
        nonlocal began
        if isinstance(event, PhaseStarted) and event.name == "federated":
            began = time.perf_counter()
        if isinstance(event, RoundClosed):
            seconds.append(time.perf_counter() - began)
            assert not event.result.receipt.failures, event.result.receipt.failures[0]
            if after_round is not None:
                after_round(simulation, event.result.round)
        if isinstance(event, RoundTimed):
            seconds[-1] -= event.seconds["evaluate"]
            began = time.perf_counter()

    with Simulation(run, policies, RunFolder.create(run).path, follow, open_data=hospitals.open_data) as simulation:
        simulation.warm_up([policy.hospital for policy in policies[:64]])
        outcome = simulation.run()
    assert outcome.completed, outcome.reason
    return seconds


def num_parameters(features: Sequence[int]) -> int:
    """Count the parameters of the network."""
    return sum(parameter.numel() for parameter in make_trainer(features).network.parameters())


def make_trainer(features: Sequence[int]) -> Any:
    """Return the trainer of such a network, as an actor makes it."""
    from medfl_ray.training.trainer import Trainer

    run = configure(1, 1, Path("unused"), features)
    return Trainer(run.model, run.training, run.data.task, 2, 1, 2, run.patch_size, False)
