"""The coordinator: one federation from start to end, as a plain class and as a Ray actor.

The same `run_in_process` runs in the driver with `pool: local` and inside the actor with `pool: ray`.
State is in the run's folder and in the hospitals' ledgers, so that the actor may die at any point and goes on
from there when Ray has started it again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

from medfl_ray.assembly.run import RunExtras, hospital_specs, run_in_process
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.events import Event
from medfl_ray.federation.run import RunOutcome
from medfl_ray.store.run.folder import RunFolder


class Coordinator:
    """The federation as an actor: `run` in one thread, `events_since` and `stop` in others.

    All that it knows is in the run's folder and in the ledgers: where its process ends, Ray starts it again, and
    `run` goes on from the last published round.
    """

    def __init__(
        self,
        policies: tuple[SitePolicy, ...],
        folder: Path,
        root: Path,
        gpus_per_actor: float,
        umask: int | None = None,
    ) -> None:
        """Take what a run needs; `umask` is that of the user who started it, for the files of the run's folder."""
        if umask is not None:
            os.umask(umask)
        self._policies, self._folder, self._root = policies, folder, root
        self._gpus_per_actor = gpus_per_actor
        self._events: deque[Event] = deque()
        self._first = 0
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"Coordinator({self._folder.name})"

    def run(self) -> RunOutcome:
        """Run the federation to its end, with the configuration in its folder."""
        import ray
        import torch

        from actors.cluster_metrics import ClusterMetrics, both
        from actors.coalitions import coalition_tasks, may_leave_home
        from actors.flower.rule import with_flower
        from actors.ray_pool import RayPool

        torch.set_num_threads(1)
        run = RunFolder.open(self._folder).run
        specs = hospital_specs(run, self._policies, self._folder, self._root)
        config = run.federation
        keeps_late = config.stragglers == "keep"
        pool = RayPool(specs, self._folder.name, config.num_actors, self._gpus_per_actor, keeps_late, config.placement)
        with ClusterMetrics(run, self._folder.name, self._policies) as metrics:
            emit = both(self._events.append, metrics.update)
            at_once = may_leave_home(specs, ray.cluster_resources())  # type: ignore[no-untyped-call]
            train = coalition_tasks(specs) if at_once else None
            extras = with_flower(run, emit, RunExtras(root=self._root, train_coalitions=train))
            return run_in_process(run, self._policies, self._folder, pool, emit, self._stop, extras)

    def events_since(self, position: int) -> list[Any]:
        """Return the events after the first `position` ones, which the caller has and which are forgotten here."""
        while self._first < position and self._events:
            self._events.popleft()
            self._first += 1
        return list(self._events)

    def stop(self) -> None:
        """Ask for an end after the current round."""
        self._stop.set()

    def process_id(self) -> int:
        """Return the coordinator's process id, for tools that watch or end it."""
        return os.getpid()
