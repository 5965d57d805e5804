"""Driver of a run: YAML to RunConfig, connect, coordinate, show. `python -m actors.train CONFIG` is `medfl-ray run`."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.coordinator import Coordinator
from actors.flower.rule import with_flower
from actors.names import actor_name
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.assembly.tracking import tracked
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ClusterError, MedflError
from medfl_ray.federation.events import Event, Notice
from medfl_ray.federation.run import RunOutcome
from medfl_ray.round_times import has_secret_cohorts
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.state_folders import state_root

POLL_S = 0.25
RESTART_S = 120.0
HEAD = "node:__internal_head__"
MAX_LIVES = 4
"""How often a coordinator may end without having published a round."""

Emit = Callable[[Event], None]


def drive(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    emit: Emit,
    address: str | None = None,
    dashboard: bool = False,
) -> RunOutcome:
    """Run a federation in `folder` and hand every event to `emit`; Ctrl-C ends it after the current round.

    Raises:
      MedflError: the run cannot start or cannot go on; what was published before is kept.
      KeyboardInterrupt: Ctrl-C was pressed a second time.
    """
    emit = tracked(run, folder, emit)
    with stop_on_interrupt(emit) as stop:
        if run.federation.pool == "local":
            pool = local_pool(hospital_specs(run, policies, folder))
            with one_thread(run.federation.exact):
                return run_in_process(run, policies, folder, pool, emit, stop, with_flower(run, emit))
        from actors.cluster import connect, disconnect

        # Ray's own figures count who is asked to train, on a page that asks for no token.
        cluster = connect(address, dashboard=dashboard, metrics=not has_secret_cohorts(run))
        try:
            if dashboard and cluster.dashboard_url:
                emit(Notice(message=f"Ray dashboard: http://{cluster.dashboard_url}"))
            if run.federation.pool == "virtual":
                from actors.simulation.run import simulate

                return simulate(run, policies, folder, emit, stop=stop)
            return _follow(run, policies, folder, emit, stop, cluster.umask)
        finally:
            disconnect()


def _follow(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    emit: Emit,
    stop: threading.Event,
    umask: int | None,
) -> RunOutcome:
    """Have a coordinator run the federation and show what happens; Ray starts it again where its process ends.

    Raises:
      MedflError: as of `run_federation`; ClusterError where the coordinator ends again and again without a new round.
    """
    import ray
    from ray.exceptions import RayError

    remote = ray.remote(Coordinator).options(
        name=actor_name(folder.name, "coordinator"),
        num_cpus=0.01,
        resources=on_the_head(ray.cluster_resources()),  # type: ignore[no-untyped-call]
        max_concurrency=4,
        max_restarts=-1,
        max_task_retries=0,
    )
    arguments = (policies, folder.resolve(), state_root(run), run.training.gpus_per_hospital, umask)
    coordinator: Any = remote.remote(*arguments)
    lives, published = 1, -1
    try:
        while True:
            outcome = _watch(coordinator, emit, stop)
            if outcome is not None:
                return outcome
            before, published = published, _num_published(folder, run)
            lives = lives + 1 if published == before else 1
            if lives > MAX_LIVES or stop.is_set():
                raise ClusterError(
                    f"the coordinator's process ended {'while it stopped' if stop.is_set() else f'{lives} times'}. "
                    f"Nothing published is lost: medfl-ray run --resume {folder.name}"
                )
            emit(Notice(message="the coordinator's process ended; it is started again and goes on from its last round"))
            # Until it is back every call would fail as if it had ended once more.
            ray.get(coordinator.process_id.options(max_task_retries=-1).remote(), timeout=RESTART_S)
    except RayError as error:
        raise ClusterError(
            f"the coordinator's process ended and could not be started again ({type(error).__name__}): Ray's own "
            "processes may have ended, on the head of the cluster. Nothing published is lost: "
            f"medfl-ray run --resume {folder.name}"
        ) from None
    finally:
        ray.kill(coordinator, no_restart=True)


def _watch(coordinator: Any, emit: Emit, stop: threading.Event) -> RunOutcome | None:
    """Follow one life of the coordinator and return how the run ended, or None where its process did."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    outcome, seen, asked = coordinator.run.remote(), 0, False
    try:
        while True:
            done, _ = ray.wait([outcome], timeout=POLL_S)
            for event in ray.get(coordinator.events_since.remote(seen)):
                seen += 1
                emit(event)
            if done:
                result: RunOutcome = ray.get(outcome)
                return result
            if stop.is_set() and not asked:
                asked = True
                ray.get(coordinator.stop.remote())
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MedflError):
            raise cause from None
        raise
    except RayActorError:
        return None


def on_the_head(resources: Mapping[str, float]) -> dict[str, float] | None:
    """Return what places an actor on the cluster's head, where the driver and the run's folder are."""
    return {HEAD: 0.001} if HEAD in resources else None


def _num_published(folder: Path, run: RunConfig) -> int:
    return sum(receipt.published for receipt in RunFolder(folder, run).receipts())


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute on one thread, as every actor does: how many threads share a convolution changes its last bits."""
    if not wanted:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_on_interrupt(emit: Emit) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the current round; the second one is a KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        emit(Notice(message="stopping after the current round; press Ctrl-C again to stop now"))

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    # The command line is the composition root and knows this package, so it is started, not imported.
    sys.argv.insert(1, "run")
    runpy.run_module("medfl_ray.cli.main", run_name="__main__")
