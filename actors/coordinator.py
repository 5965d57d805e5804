"""The coordinator: one federation from start to end, as a plain class and as a Ray actor.

The same `run_in_process` runs in the driver with `pool: local` and inside the actor with `pool: ray`.
State is in the run's folder and in the hospitals' ledgers, so that the actor may die at any point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from actors.hospital import HospitalSpec, build_hospital, state_folder
from medfl_ray.config import RunConfig
from medfl_ray.federation.baselines import CENTRAL, central_policy
from medfl_ray.federation.events import Event
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.federation.ports import ClientPool
from medfl_ray.federation.run import RunOutcome, RunParts, run_federation
from medfl_ray.params import Layout, Vector
from medfl_ray.site_policy import SitePolicy
from medfl_ray.store.run_folder import RunFolder


def hospital_specs(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path) -> list[HospitalSpec]:
    """Return what each process needs to build its hospital, the central baseline's last where the run has one."""
    members = tuple(policy.hospital for policy in policies)
    specs = [
        HospitalSpec(run, policy, index, (policy.hospital,), state_folder(run, policy, folder))
        for index, policy in enumerate(policies)
    ]
    if CENTRAL in run.federation.baselines:
        pooled = central_policy(policies, run.data.name)
        specs.append(HospitalSpec(run, pooled, len(specs), members, state_folder(run, pooled, folder), tuple(specs)))
    return specs


def local_pool(specs: list[HospitalSpec]) -> LocalPool:
    """Return all hospitals in this process."""
    return LocalPool({spec.policy.hospital: partial(build_hospital, spec) for spec in specs})


def initial_weights(run: RunConfig) -> Callable[[int, int], tuple[Layout, Vector]]:
    """Return a function from channels in and out to the network's layout and seeded first weights."""

    def build(in_channels: int, out_channels: int) -> tuple[Layout, Vector]:
        from medfl_ray.training.trainer import Trainer

        trainer = Trainer(
            model=run.model,
            training=run.training.model_copy(update={"device": "cpu"}),
            task=run.data.task,
            spatial_dims=run.spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=run.patch_size,
            for_dp=run.privacy.enable_dp,
        )
        return trainer.layout, trainer.initial_weights(run.federation.seed)

    return build


def run_in_process(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    pool: ClientPool,
    emit: Callable[[Event], None],
    stop: threading.Event,
) -> RunOutcome:
    """Run a federation against a pool, and close the pool whatever happens."""
    store = RunFolder(folder, run)
    try:
        return run_federation(RunParts(run, store.job, policies, pool, store, initial_weights(run), emit, stop))
    finally:
        pool.close()


class Coordinator:
    """The federation as an actor: `run` in one thread, `events_since` and `stop` in others."""

    def __init__(self, run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, gpus_per_actor: float) -> None:
        self._run, self._policies, self._folder = run, policies, folder
        self._gpus_per_actor = gpus_per_actor
        self._events: list[Event] = []
        self._stop = threading.Event()

    def run(self) -> RunOutcome:
        """Run the federation to its end."""
        import torch

        from actors.ray_pool import RayPool

        torch.set_num_threads(1)
        specs = hospital_specs(self._run, self._policies, self._folder)
        pool = RayPool(specs, self._folder.name, self._run.federation.num_actors, self._gpus_per_actor)
        return run_in_process(self._run, self._policies, self._folder, pool, self._events.append, self._stop)

    def events_since(self, position: int) -> list[Any]:
        """Return the events after the first `position` ones."""
        return self._events[position:]

    def stop(self) -> None:
        """Ask for an end after the current round."""
        self._stop.set()
