"""The coordinator: one federation from start to end, as a plain class and as a Ray actor.

The same `run_in_process` runs in the driver with `pool: local` and inside the actor with `pool: ray`.
State is in the run's folder and in the hospitals' ledgers, so that the actor may die at any point and goes on
from there when Ray has started it again.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from actors.hospital import HospitalSpec, build_hospital
from medfl_ray.config import RunConfig
from medfl_ray.errors import ConfigError
from medfl_ray.federation.baselines import CENTRAL, central_policy
from medfl_ray.federation.coalitions import TrainCoalitions
from medfl_ray.federation.events import Event
from medfl_ray.federation.hospital_level import FEDERATION, federation_budget, plan_central
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.federation.ports import ClientPool, Ledger
from medfl_ray.federation.round_context import Combine
from medfl_ray.federation.run import RunOutcome, RunParts, run_federation
from medfl_ray.params import Layout, Vector
from medfl_ray.round_times import clock_of, has_secret_cohorts
from medfl_ray.site_policy import SitePolicy
from medfl_ray.store.ledger_events import LedgerHead
from medfl_ray.store.run_folder import RunFolder
from medfl_ray.store.run_mirror import RunMirror, receipt_heads
from medfl_ray.store.signing_key import signature_is_valid
from medfl_ray.store.state_folders import federation_folder, hospital_folder, state_root

FirstWeights = Callable[[int, int], tuple[Layout, Vector]]


def hospital_specs(
    run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path | None = None
) -> list[HospitalSpec]:
    """Return what each process needs to build its hospital, the central baseline's last where the run has one.

    Args:
      root: folder of the ledgers that outlive the run, from the process that started it; see `state_root`.

    Raises:
      LedgerError: the coordinator's mirror was altered or cannot be read.
    """
    root = root or state_root(run)
    members = tuple(policy.hospital for policy in policies)
    expected = expected_heads(run, policies, folder, root)
    job = RunFolder(folder, run).job
    specs = [
        HospitalSpec(
            run,
            policy,
            index,
            (policy.hospital,),
            hospital_folder(policy, folder, root),
            signing_seed=None if run.privacy.patient_level else secrets.token_bytes(32),
            expected_heads=expected.get(policy.hospital, ()),
            job=job,
        )
        for index, policy in enumerate(policies)
    ]
    if CENTRAL in run.federation.baselines:
        pooled = central_policy(policies, run.data.name)
        own = hospital_folder(pooled, folder, root)
        specs.append(HospitalSpec(run, pooled, len(specs), members, own, pooled=tuple(specs)))
    return specs


def expected_heads(
    run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path
) -> dict[str, tuple[str, ...]]:
    """Return the rows that each hospital's ledger must hold: of the mirror, and of the run's last receipt."""
    charged = [policy for policy in policies if run.privacy.patient_level or policy.declared == "private"]
    if not charged:
        return {}
    mirror = run_mirror(run, policies, folder, root)
    receipts = receipt_heads(RunFolder(folder, run).signed_receipts())
    return {
        policy.hospital: mirror.expected_heads(policy.hospital, receipts.get(policy.hospital)) for policy in charged
    }


def run_mirror(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path) -> RunMirror:
    """Return the coordinator's copies of a run's ledgers, the federation's own among them where it has one."""
    return RunMirror(policies, folder, root, (FEDERATION, run.data.name) if run.privacy.central else None)


def open_federation_ledger(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path) -> Ledger:
    """Open the federation's account of hospital-level epsilon; it holds what mirror and last receipt have seen.

    Raises:
      LedgerError: the account is damaged, locked, or lacks such a row.
    """
    from medfl_ray.store.ledger import PrivacyLedger

    plan = plan_central(run, policies)
    assert plan is not None
    max_epsilon, one_run = federation_budget(run, policies)
    last = receipt_heads(RunFolder(folder, run).signed_receipts()).get(FEDERATION)
    expected = run_mirror(run, policies, folder, root).expected_heads(FEDERATION, last)
    own = federation_folder(policies, folder, root)
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    return PrivacyLedger.open(
        own / "ledger.sqlite",
        hospital=FEDERATION,
        data_set=run.data.name,
        delta=plan.delta,
        max_epsilon=max_epsilon,
        one_run=one_run,
        unit="hospital",
        expected_heads=[LedgerHead.parse(head) for head in expected],
        clock=clock_of(has_secret_cohorts(run)),
    )


def local_pool(specs: list[HospitalSpec]) -> LocalPool:
    """Return all hospitals in this process."""
    keeps_late = bool(specs) and specs[0].run.federation.stragglers == "keep"
    return LocalPool({spec.policy.hospital: partial(build_hospital, spec) for spec in specs}, keeps_late)


def initial_weights(run: RunConfig) -> FirstWeights:
    """Return a function from channels in and out to layout and first weights: seeded, or those of a file."""

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
            for_dp=run.privacy.patient_level,
        )
        if run.training.initial_weights is not None:
            from medfl_ray.export.public_weights import load_public_weights

            file, expected = run.training.initial_weights, run.training.initial_weights_sha256
            return trainer.layout, load_public_weights(file, trainer.layout, expected)
        return trainer.layout, trainer.initial_weights(run.federation.seed)

    return build


def with_flower(
    run: RunConfig, first_weights: FirstWeights, emit: Callable[[Event], None]
) -> tuple[FirstWeights, Combine | None]:
    """Return the rule over all updates where a run names a Flower strategy, and first weights that also try it out.

    Raises:
      ConfigError: the strategy cannot be made or does not go with the run.
    """
    if run.aggregation.strategy != "flower":
        return first_weights, None
    try:
        from actors.flower_app import FlowerAggregation
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise ConfigError(
            "aggregation.strategy 'flower' needs the package flwr, which this Python cannot import; install medfl-ray "
            "with its dependencies, or choose another strategy"
        ) from None

    aggregation = FlowerAggregation(run, emit)
    return aggregation.checked(first_weights), aggregation


def run_in_process(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    pool: ClientPool,
    emit: Callable[[Event], None],
    stop: threading.Event,
    root: Path | None = None,
    train_coalitions: TrainCoalitions | None = None,
) -> RunOutcome:
    """Run a federation against a pool, and close the pool whatever happens; `root` as in `hospital_specs`."""
    root = root or state_root(run)
    store = RunFolder(folder, run, federation_folder(policies, folder, root))
    try:
        first_weights, combine = with_flower(run, initial_weights(run), emit)
        return run_federation(
            RunParts(
                run=run,
                job=store.job,
                policies=policies,
                pool=pool,
                store=store,
                mirror=run_mirror(run, policies, folder, root),
                initial_weights=first_weights,
                emit=emit,
                stop=stop,
                open_federation_ledger=partial(open_federation_ledger, run, policies, folder, root),
                is_signed=signature_is_valid,
                train_coalitions=train_coalitions,
                combine=combine,
            )
        )
    finally:
        pool.close()
        store.close()


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
        """Take what a run needs; `umask` is of whoever started it, for the files of the run's folder."""
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
            return run_in_process(run, self._policies, self._folder, pool, emit, self._stop, self._root, train)

    def events_since(self, position: int) -> list[Any]:
        """Return the events after the first `position` ones, which are forgotten: whoever asks has them."""
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
