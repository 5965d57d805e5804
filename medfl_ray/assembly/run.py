"""Builds a run out of its parts and runs it; works with every pool, and needs neither Ray nor Flower."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.ledgers import expected_heads, open_federation_ledger, run_mirror
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError
from medfl_ray.federation.events import Event
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.federation.ports import ClientPool
from medfl_ray.federation.round_context import Combine, Select
from medfl_ray.federation.run import RunOutcome, RunParts, run_federation
from medfl_ray.federation.studies.baselines import CENTRAL, central_policy
from medfl_ray.federation.studies.coalitions import TrainCoalitions
from medfl_ray.params import Layout, Vector
from medfl_ray.store.run.folder import RunFolder
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


def local_pool(specs: list[HospitalSpec], clock: Callable[[], float] = time.monotonic) -> LocalPool:
    """Return all hospitals in this process; `clock` counts the seconds of deadlines."""
    keeps_late = bool(specs) and specs[0].run.federation.stragglers == "keep"
    return LocalPool({spec.policy.hospital: partial(build_hospital, spec) for spec in specs}, keeps_late, clock)


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


@dataclass(frozen=True)
class RunExtras:
    """What the system around a run adds to its parts; whatever is None is the core's own.

    `root` holds the ledgers that outlive the run, see `state_root`. `first_weights` returns layout and first weights
    from the channels in and out; `select`, `combine` and `train_coalitions` are as in `RunParts`.
    """

    root: Path | None = None
    first_weights: FirstWeights | None = None
    select: Select | None = None
    combine: Combine | None = None
    train_coalitions: TrainCoalitions | None = None


NO_EXTRAS = RunExtras()


def run_in_process(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    pool: ClientPool,
    emit: Callable[[Event], None],
    stop: threading.Event,
    extras: RunExtras = NO_EXTRAS,
) -> RunOutcome:
    """Run a federation against a pool, and close the pool whatever happens.

    Raises:
      MedflError: as of `run_federation`.
    """
    try:
        return run_on_pool(run, policies, folder, pool, emit, stop, extras)
    finally:
        pool.close()


def run_on_pool(
    run: RunConfig,
    policies: tuple[SitePolicy, ...],
    folder: Path,
    pool: ClientPool,
    emit: Callable[[Event], None],
    stop: threading.Event,
    extras: RunExtras = NO_EXTRAS,
) -> RunOutcome:
    """Run a federation against a pool that stays open afterwards; this is the one place that builds `RunParts`.

    Raises:
      ConfigError: the strategy is one of Flower's and `extras` lack its rule.
      MedflError: as of `run_federation`.
    """
    if run.aggregation.traits.rule_from_outside and extras.combine is None:
        raise ConfigError(
            "aggregation.strategy 'flower' needs its rule, which this process did not bring; start the run with "
            "medfl-ray run, or pass with_flower(run, emit) of actors/flower/rule.py as extras"
        )
    root = extras.root or state_root(run)
    with closing(RunFolder(folder, run, federation_folder(policies, folder, root))) as store:
        return run_federation(
            RunParts(
                run=run,
                job=store.job,
                policies=policies,
                pool=pool,
                store=store,
                mirror=run_mirror(run, policies, folder, root),
                initial_weights=extras.first_weights or initial_weights(run),
                emit=emit,
                stop=stop,
                open_federation_ledger=partial(open_federation_ledger, run, policies, folder, root),
                is_signed=signature_is_valid,
                select=extras.select,
                combine=extras.combine,
                train_coalitions=extras.train_coalitions,
            )
        )
