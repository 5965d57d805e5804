"""Federations of fewer hospitals as Ray tasks, several at once: each is a whole small federation in one process.

Only of data that are public or synthetic, with differential privacy off and on no node of their own: a task opens
the data of several hospitals, and a ledger has one writer. Elsewhere the run's own actors train one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from actors.placement import resource_of
from actors.ray_pool import put
from medfl_ray.aggregation.strategies import build_strategy
from medfl_ray.assembly.run import local_pool
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.errors import FederationError
from medfl_ray.federation.events import Event
from medfl_ray.federation.round_context import RoundContext
from medfl_ray.federation.studies.baselines import CENTRAL
from medfl_ray.federation.studies.coalitions import NoKeeper, NoMirror, TrainCoalitions, train_coalition
from medfl_ray.params import Vector
from medfl_ray.study_records import CoalitionRecord


def may_leave_home(specs: Sequence[HospitalSpec], resources: Mapping[str, float]) -> bool:
    """Say whether a process that belongs to no hospital may open the data, and computes as the hospitals' actors do.

    Args:
      resources: of the cluster. On its GPUs the actors train, and a task would have none.
    """
    if not specs or specs[0].run.privacy.enable_dp or resources.get("GPU", 0) > 0:
        return False
    return all(
        spec.policy.declared != "private" and resource_of(spec.policy.hospital) not in resources for spec in specs
    )


def coalition_tasks(specs: Sequence[HospitalSpec]) -> TrainCoalitions:
    """Return what trains several coalitions at once, as many as the cluster has cores."""
    own = [spec for spec in specs if spec.policy.hospital != CENTRAL]

    def train(
        context: RoundContext, initial: Vector, coalitions: Sequence[tuple[str, ...]]
    ) -> Iterator[CoalitionRecord]:
        at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        # No core is booked: the hospitals' actors, which have booked theirs, wait for these tasks.
        task = ray.remote(train_in_one_process).options(num_cpus=0, max_retries=2)
        shared, plain = put(initial), portable(context)
        waiting = list(coalitions)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(task.remote(own, plain, shared, waiting.pop(0)))
            ready, running = ray.wait(running)
            record = taken(ready[0])
            if isinstance(record, str):
                raise FederationError(record)
            yield record

    return train


def taken(reference: Any) -> CoalitionRecord | str:
    """Return what a task answers, or why it has no answer."""
    try:
        answer: CoalitionRecord | str = ray.get(reference)
    except RayError as error:
        return f"Ray lost a federation of fewer hospitals ({type(error).__name__}); resume the run to train it again"
    return answer


def portable(context: RoundContext) -> RoundContext:
    """Return a context without what belongs to this process; the task fills in pool and strategy."""
    gone: dict[str, Any] = {"pool": None, "strategy": None, "select": drop}
    return replace(context, store=NoKeeper(), mirror=NoMirror(), emit=drop, keys={}, **gone)


def drop(*event: Event) -> None:
    """Tell nobody."""


def train_in_one_process(
    specs: Sequence[HospitalSpec], context: RoundContext, initial: Vector, hospitals: tuple[str, ...]
) -> CoalitionRecord | str:
    """Build the hospitals here, train some of them, and score the result at all; or say why that failed."""
    import torch

    torch.set_num_threads(1)
    pool = local_pool(list(specs))
    try:
        num_hospitals = sum(not spec.pooled for spec in specs)
        own = replace(context, pool=pool, strategy=build_strategy(context.run.aggregation, num_hospitals))
        return train_coalition(own, initial, hospitals)
    except FederationError as error:
        return str(error)
    finally:
        pool.close()
