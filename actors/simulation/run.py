"""Simulations: a federation of virtual hospitals. `python -m actors.simulation.run CONFIG` is `medfl-ray simulate`.

A run like any other, with checkpoints, receipts and report; only the hospitals are names that share a few actors.
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from medfl_ray.assembly.run import RunExtras, run_on_pool
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, FederationError
from medfl_ray.federation.events import Event, Notice, RoundClosed, RoundTimed
from medfl_ray.federation.planning import account_delta, steps_per_round
from medfl_ray.federation.round_context import Select as RoundSelect
from medfl_ray.federation.run import RunOutcome, network_shape
from medfl_ray.messages import HospitalInfo, RoundPlan
from medfl_ray.params import Layout, Vector
from medfl_ray.store.ledger.simulated import Account, SimulatedLedgers
from medfl_ray.store.run.folder import RunFolder

if TYPE_CHECKING:
    from actors.simulation.pool import VirtualPool
    from actors.simulation.work import OpenData

Emit = Callable[[Event], None]
CohortOf = Callable[[int], Sequence[str]]
LEDGERS = "ledgers"


def simulate(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    emit: Emit,
    *,
    open_data: OpenData | None = None,
    select: CohortOf | None = None,
    initial: Vector | None = None,
    stop: threading.Event | None = None,
) -> RunOutcome:
    """Simulate a run in its folder on the Ray cluster that is connected; see `Simulation`."""
    with Simulation(run, policies, folder, emit, open_data=open_data, initial=initial) as simulation:
        return simulation.run(select, stop)


class Simulation:
    """A simulation whose actors live from `with` to its end, so that they may be warm before a run is timed."""

    def __init__(
        self,
        run: RunConfig,
        policies: tuple[SitePolicy, ...],
        folder: Path,
        emit: Emit,
        *,
        open_data: OpenData | None = None,
        initial: Vector | None = None,
    ) -> None:
        """Start the actors on the connected Ray cluster.

        Args:
          folder: of the run, with its configuration; see `RunFolder.create`.
          open_data: returns a hospital's data by its name, in the process that trains it; the run's own data if None.
          initial: first weights [P]; those of the configuration if None.

        Raises:
          ConfigError: the run asks for what virtual hospitals cannot do.
        """
        from actors.simulation.pool import VirtualPool
        from actors.simulation.work import Memories

        self._run, self._policies, self._folder, self._emit = run, policies, folder, emit
        ledgers = partial(open_ledgers, run, policies, folder) if run.privacy.patient_level else None
        memories = Memories()
        if run.aggregation.is_stateful:
            job = RunFolder(folder, run).job
            memories = Memories(folder.absolute() / "hospitals", job, run.output.keep_checkpoints)
        self.pool = VirtualPool(run, policies, ledgers, open_data, folder.name, memories)
        self._initial = initial
        self._network: tuple[Layout, Vector] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.close()

    def warm_up(self, hospitals: Sequence[str]) -> None:
        """Train hospitals once and forget what came of it: libraries, data and processes are then in place.

        Raises:
          ConfigError: the run is private; a training that nobody charged must not happen.
          FederationError: the hospitals cannot start.
        """
        if self._run.privacy.enable_dp:
            raise ConfigError("a run with differential privacy is not warmed up: every training has to be charged")
        infos = [answer for answer in self.pool.describe() if isinstance(answer, HospitalInfo)]
        if not infos:
            raise FederationError("no hospital could start")
        _, weights = self._first_weights(*network_shape(self._run, infos))
        policies = {policy.hospital: policy for policy in self._policies}
        plan = RoundPlan(
            job="warm-up",
            round=0,
            attempt=0,
            config_hash="",
            weights_checksum="",
            hospitals=tuple(hospitals),
            num_steps={name: steps_per_round(self._run, policies[name]) for name in hospitals},
            learning_rate=self._run.training.learning_rate,
            mechanisms={},
        )
        for _ in self.pool.train(plan, hospitals, weights):
            pass

    def run(self, select: CohortOf | None = None, stop: threading.Event | None = None) -> RunOutcome:
        """Run all rounds and the last evaluation; `select` names a round's cohort instead of the configuration.

        Raises:
          MedflError: as of `run_federation`.
        """
        from threadpoolctl import threadpool_limits

        from actors.cluster_metrics import ClusterMetrics, both
        from actors.flower.rule import with_flower

        extras = RunExtras(first_weights=self._first_weights, select=None if select is None else among_able(select))
        with (
            ClusterMetrics(self._run, self._folder.name, self._policies) as metrics,
            threadpool_limits(1, "blas"),  # a second thread would wait for work on a core that an actor needs
            gc_frozen(),
        ):
            emit = partial(self._timed, both(self._emit, metrics.update))
            extras = with_flower(self._run, self._emit, extras)
            stop = stop or threading.Event()
            return run_on_pool(self._run, self._policies, self._folder, self.pool, emit, stop, extras)

    def _first_weights(self, in_channels: int, out_channels: int) -> tuple[Layout, Vector]:
        """Have the network built once, for the warm-up and the run alike."""
        if self._network is None:
            layout, weights = self.pool.first_weights(in_channels, out_channels)
            if self._initial is not None and self._initial.shape != (layout.size,):
                raise ConfigError(f"the first weights have shape {self._initial.shape}; the network has {layout.size}")
            self._network = layout, weights if self._initial is None else self._initial
        return self._network

    def _timed(self, emit: Emit, event: Event) -> None:
        emit(event)
        for note in self.pool.notes:
            emit(Notice(message=note))
        self.pool.notes.clear()
        # Of a secret cohort neither its size is said nor how long it took, which depends on it.
        if isinstance(event, RoundClosed) and not event.result.receipt.secret_cohort:
            result = event.result
            seconds = where_time_went(self.pool, result.duration_s)
            asked = len(result.receipt.asked)
            emit(RoundTimed(round=result.round, num_hospitals=asked, duration_s=result.duration_s, seconds=seconds))


def among_able(select: CohortOf) -> RoundSelect:
    """Return a selection that asks only those of the named hospitals that may be asked."""
    return lambda number, able: tuple(sorted(set(select(number)) & set(able)))


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Leave what is there out of collections of garbage, which would walk through all libraries between two rounds."""
    if gc.get_freeze_count():  # whoever froze something has done this already, and counts on it
        yield
        return
    gc.collect()  # what an earlier run has left would else stay until the end of this one
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def where_time_went(pool: VirtualPool, duration_s: float) -> dict[str, float]:
    """Split a round's seconds: the actors' shares are means over them, and aggregate is all the coordinator does."""
    spent = pool.seconds
    own = {name: spent.get(name, 0.0) / pool.num_actors for name in ("train", "data", "sum")}
    wall, evaluate = spent.get("wall", 0.0), spent.get("evaluate", 0.0)
    return {
        "train": own["train"],
        "data": own["data"],
        "wait": max(0.0, wall - sum(own.values())),
        "aggregate": own["sum"] + max(0.0, duration_s - wall - evaluate),
        "evaluate": evaluate,
    }


def open_ledgers(run: RunConfig, policies: Sequence[SitePolicy], folder: Path) -> SimulatedLedgers:
    """Open the accounts of a simulation's hospitals, which lie in the run's own folder."""
    known = {policy.hospital: policy for policy in policies}

    def account(hospital: str) -> Account:
        policy = known[hospital]
        return Account(
            hospital, policy.data_set, account_delta(run, policy), policy.max_epsilon, policy.max_total_steps
        )

    return SimulatedLedgers(folder / LEDGERS, account)


if __name__ == "__main__":
    # The command line is the composition root and knows this package, so it is started, not imported.
    sys.argv.insert(1, "simulate")
    runpy.run_module("medfl_ray.cli.main", run_name="__main__")
