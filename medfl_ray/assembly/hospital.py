"""Builds a hospital in the process in which it trains, for every pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from medfl_ray.assembly.ledgers import open_ledger, open_memory, signing_key
from medfl_ray.assembly.spec import HospitalSpec, agreement_of, check_own_policy, keeps_account, make_state_folder
from medfl_ray.config.run import RunConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.errors import ConfigError, DataError, LabelError
from medfl_ray.federation.hospital import Hospital, HospitalParts
from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes, answer_step_s
from medfl_ray.federation.hospital_rules.private_answers import is_confidential, shown_reason
from medfl_ray.messages import (
    Mechanism,
)
from medfl_ray.params import Vector

PICTURES_PER_HOSPITAL = 2
CACHE_FOLDER = "cache"
log = structlog.get_logger()
OpenData = Callable[[RunConfig, tuple[str, ...]], Any]
T = TypeVar("T")


Reservations = MutableMapping[tuple[str, int, int], tuple[str, Mechanism]]


def build_hospital(
    spec: HospitalSpec,
    open_data: OpenData | None = None,
    reservations: Reservations | None = None,
    times: AnswerTimes | None = None,
) -> Hospital:
    """Open data, network and ledger of one hospital; `reservations` are those left open by an earlier process.

    Of private data it takes a time that follows from declared figures alone, whether it succeeds or not.

    Args:
      open_data: instead of `open_hospital_data`, where a process has the same images open already.
      times: the clock of the hospital's answers.

    Raises:
      DataError, ModelError, PrivacyError: with the reason, in words that hold no identifier.
    """
    from medfl_ray.models.light_monai import load_monai

    load_monai()  # not where the actor is made: until then Ray counts it as not there, and calls fail
    configure_logs()
    check_own_policy(spec)
    if not is_confidential(spec.policy):
        return _build(spec, open_data, reservations, times or AnswerTimes())
    times = times or _kept_times(spec)
    with times.padded("describe", answer_step_s(spec.policy)):
        return _build(spec, open_data, reservations, times)


def _build(
    spec: HospitalSpec, open_data: OpenData | None, reservations: Reservations | None, times: AnswerTimes
) -> Hospital:
    if spec.run.training.client_algo is not None:
        return algo_hospital(spec, times)
    return _built(spec, _opened(spec, open_data), reservations, times)


def _kept_times(spec: HospitalSpec) -> AnswerTimes:
    """Return the clock of private answers, which remembers over restarts how often a step was too short."""
    from medfl_ray.store.run.scoring_record import AnswerSteps

    make_state_folder(spec)
    return AnswerTimes(doublings=AnswerSteps(spec.state_folder))


def _opened(spec: HospitalSpec, open_data: OpenData | None) -> Any:
    """Open the hospital's data; what is wrong with private ones stays in its own log."""
    from medfl_ray.data.sources import open_hospital_data

    run, policy = spec.run, spec.policy
    try:
        if open_data is not None:
            data = open_data(run, spec.members)
        else:
            data = open_hospital_data(run, spec.members, cache_root=cache_root(spec))
        if is_confidential(policy):
            _check_cases(data, policy.hospital)
    except ConfigError:
        raise  # of the run's own names, read before any case
    except Exception as error:
        if is_confidential(policy):
            raise DataError(shown_reason(policy, error, "start")) from None
        raise
    return data


def _check_cases(data: Any, hospital: str) -> None:
    """Leave out what cannot be used: a broken case must not fail the round that first draws its patient."""
    try:
        data.check_cases()
    finally:
        for note in data.notes:
            log.warning("case_not_used", hospital=hospital, note=note)


def cache_root(spec: HospitalSpec) -> Path | None:
    """Return where prepared volumes may lie on the disk: in the hospital's own folder, that of its ledger.

    Also for a run that keeps none there: what a killed one left is swept when the next one starts.
    """
    if not is_confidential(spec.policy):
        return None
    make_state_folder(spec)
    return spec.state_folder / CACHE_FOLDER


def _built(spec: HospitalSpec, data: Any, reservations: Reservations | None, times: AnswerTimes) -> Hospital:
    from medfl_ray.store.run.scoring_record import ScoredModels
    from medfl_ray.training.optimizers import make_optimizer
    from medfl_ray.training.rules.passes import LocalRules
    from medfl_ray.training.trainer import Trainer

    run, policy = spec.run, spec.policy
    check_classes(run, data.labels)
    check_channels(run, data.channels)
    trainer = Trainer(
        model=run.model,
        training=training_of(run, policy.hospital),
        task=run.data.task,
        spatial_dims=run.spatial_dims,
        in_channels=run.model.in_channels or len(data.channels),
        out_channels=run.model.out_channels or max(data.labels, default=1) + 1,
        patch_size=run.patch_size,
        for_dp=run.privacy.patient_level,
        exact=run.federation.exact,
    )
    # For its first optimizer PyTorch loads its compiler; not in a round, whose deadline would run meanwhile.
    make_optimizer(trainer.training, trainer.network.parameters(), run.training.learning_rate)
    if run.privacy.patient_level:
        trainer.group_size()  # refuses here, before anything is charged, a network that mixes patients
    make_state_folder(spec)
    ledger = open_ledger(spec) if keeps_account(spec) else None

    def local_report(
        round: int, values: Mapping[str, float], scores: Sequence[Any], pictures: tuple[bytes, ...]
    ) -> None:
        from medfl_ray.analytics.report import write_local_report

        figures = [score.headline for score in scores]
        spent = ledger.spent() if ledger is not None else None
        write_local_report(spec.state_folder, policy.hospital, run, round, values, figures, pictures, spent)

    return Hospital(
        HospitalParts(
            run=run,
            policy=policy,
            index=spec.index,
            trainer=trainer,
            rules=LocalRules(trainer, run.aggregation),
            data=data,
            ledger=ledger,
            make_pictures=make_pictures,
            write_local_report=local_report,
            signer=signing_key(spec),
            memory=open_memory(spec),
            reservations={} if reservations is None else reservations,
            agreement=agreement_of(spec),
            times=times,
            scored=ScoredModels(spec.state_folder, spec.job) if is_confidential(policy) else None,
        )
    )


def algo_hospital(spec: HospitalSpec, times: AnswerTimes) -> Hospital:
    """Return a hospital that trains by the ClientAlgo which its run names, and opens no data of its own.

    Raises:
      ConfigError: the ClientAlgo cannot be made, or pooled data are asked for.
    """
    from medfl_ray.federation.algo_hospital import AlgoHospital
    from medfl_ray.training.rules.client_algo import AlgoData, AlgoTrainer
    from medfl_ray.training.trainer import Trainer

    run, hospital = spec.run, spec.policy.hospital
    if spec.pooled or run.training.client_algo is None:
        raise ConfigError("the central baseline pools data that a ClientAlgo keeps to itself; leave it out")
    check_classes(run, run.data.labels)
    check_channels(run, run.data.channels)
    layout = Trainer(
        model=run.model,
        training=run.training.model_copy(update={"device": "cpu"}),
        task=run.data.task,
        spatial_dims=run.spatial_dims,
        in_channels=run.model.in_channels or len(run.data.channels),
        out_channels=run.model.out_channels or max(run.data.labels, default=1) + 1,
        patch_size=run.patch_size,
        for_dp=False,
    ).layout
    algo: Any = AlgoTrainer(run.training.client_algo, hospital, layout)
    data: Any = AlgoData(run.data.channels, run.data.labels)
    nothing: Any = lambda *given: None  # noqa: E731 - no pictures, no report of its own
    rules: Any = None  # a ClientAlgo trains by its own
    make_state_folder(spec)
    parts = HospitalParts(
        run=run,
        policy=spec.policy,
        index=spec.index,
        trainer=algo,
        rules=rules,
        data=data,
        ledger=open_ledger(spec) if keeps_account(spec) else None,
        make_pictures=nothing,
        write_local_report=nothing,
        signer=signing_key(spec),
        agreement=agreement_of(spec),
        times=times,
    )
    return AlgoHospital(parts, algo)


def check_classes(run: RunConfig, labels: Mapping[int, str]) -> None:
    """Refuse names of labels that the network has no output for: found in training, that would tell of a patient.

    Raises:
      LabelError: with the number of outputs that are needed.
    """
    needed = max(labels, default=1) + 1
    if run.model.out_channels is not None and run.model.out_channels < needed:
        raise LabelError(
            f"model.out_channels is {run.model.out_channels}; the labels need {needed}: set it to that, or leave it out"
        )


def check_channels(run: RunConfig, channels: Sequence[str]) -> None:
    """Refuse a network for other channels than the data have: found in training, that would have been charged.

    Raises:
      ConfigError: with both numbers.
    """
    if run.model.in_channels is not None and run.model.in_channels != len(channels):
        raise ConfigError(
            f"the network takes {run.model.in_channels} image channels (model.in_channels, or the bundle's); the data "
            f"have {len(channels)}: {', '.join(channels)}. Name those to use in data.channels, or take another network"
        )


def configure_logs() -> None:
    """Let a hospital's log print tracebacks without local variables, which hold images and identifiers."""
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


def training_of(run: RunConfig, hospital: str) -> TrainingConfig:
    """Return how a hospital trains: in groups of the size that it measured when the run was first started."""
    measured = run.training.measured_group_sizes.get(hospital)
    return run.training if measured is None else run.training.model_copy(update={"patient_group_size": measured})


def make_pictures(trainer: Any, weights: Vector, data: Any) -> tuple[bytes, ...]:
    """Render the first held-out patients' predictions next to the truth, as PNG."""
    from medfl_ray.analytics.pictures import prediction_png

    pictures = []
    for case in list(data.holdout)[:PICTURES_PER_HOSPITAL]:
        prediction = trainer.predict(weights, case)
        picture = prediction_png(
            case.image, case.label, prediction, dict(data.labels), affine=case.affine, channels=data.channels
        )
        pictures.append(picture)
    return tuple(pictures)
