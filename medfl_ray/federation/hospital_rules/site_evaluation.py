"""What a hospital says of given weights: which figures it computes, and which of them may leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from medfl_ray import params
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.hospital_rules.answer_times import answer_step_s
from medfl_ray.federation.hospital_rules.labels import labelled
from medfl_ray.federation.hospital_rules.private_answers import ScoringRecord, is_confidential, suppressed_evaluation
from medfl_ray.messages import ReliabilityBins, SiteEvaluation
from medfl_ray.params import Vector
from medfl_ray.training.scoring.evaluation import PatientScore, headline_of_shared, summarise
from medfl_ray.training.scoring.intervals import Intervals, bootstrap_intervals, intervals_of_means

if TYPE_CHECKING:  # the driver of a simulation, which names this room, must not spend its time and memory on torch
    from medfl_ray.data.prepare.dataset import HospitalData
    from medfl_ray.federation.hospital import HospitalParts
    from medfl_ray.training.trainer import Trainer

log = structlog.get_logger()
Bins = Mapping[str, ReliabilityBins]
Score = Callable[[int, Vector, bool], SiteEvaluation]
"""Scores weights on the held-out patients: (round, weights [P], whether it is the last evaluation of the run)."""


def score_site(parts: HospitalParts, round: int, weights: Vector, is_last: bool) -> SiteEvaluation:
    """Score weights on the held-out patients; of private data the last scores also become the hospital's own report."""
    run, policy = parts.run, parts.policy
    own = weights if parts.memory is None else parts.rules.evaluated(parts.memory.before(round + 1), weights)
    scores, bins = score_patients(parts.trainer, own, parts.data, run, is_last)
    shared = None
    if round and run.aggregation.is_personal:
        shared = scores if own is weights else parts.trainer.evaluate(weights, parts.data)
    values = figures_of(scores, shared)
    drawn = parts.make_pictures(parts.trainer, own, parts.data) if is_last else ()
    if is_confidential(policy) and is_last:
        parts.write_local_report(round, values, scores, drawn)
    return site_evaluation(run, policy, round, values, scores, bins, drawn, is_last)


def suppressed_scores(parts: HospitalParts, round: int, weights: Vector, is_last: bool, score: Score) -> SiteEvaluation:
    """Return the constant answer; the last model of a run is scored, once, for the hospital's own report.

    Whether it could be scored shows nowhere, and how long that took not beyond the steps of the answers' clock. No
    other model is scored: of its scores nothing would be left.
    """
    if is_last and parts.scored is not None:
        with parts.times.padded("evaluate", answer_step_s(parts.policy)):
            try:
                _score_once(parts.scored, round, weights, score)
            except Exception as error:
                log.error("scoring_failed", hospital=parts.policy.hospital, round=round, exc_info=error)
    return suppressed_evaluation(parts.run, parts.policy, parts.data.labels, round, is_last)


def _score_once(scored: ScoringRecord, round: int, weights: Vector, score: Score) -> None:
    checksum = params.checksum(weights)
    if scored.admit("final", checksum):
        score(round, weights, True)
        scored.finish("final", checksum)
    else:
        log.warning("not_scored_again", round=round)


def score_patients(
    trainer: Trainer, weights: Vector, data: HospitalData, run: RunConfig, is_last: bool
) -> tuple[list[PatientScore], Bins]:
    """Score the held-out patients; at the last evaluation with every figure that the run asks for."""
    if not is_last or not run.evaluation.is_full:
        return trainer.evaluate(weights, data), {}
    from medfl_ray.training.scoring.final_evaluation import evaluate_fully

    full = evaluate_fully(trainer, weights, data, run)
    return full.scores, full.bins


def figures_of(scores: Sequence[PatientScore], shared: Sequence[PatientScore] | None = None) -> dict[str, float]:
    """Return the means over the patients.

    `shared` are the shared model's scores where `scores` are of the hospital's own; of them the headline alone is
    shown.
    """
    values = summarise(scores)
    if shared is not None:
        values |= headline_of_shared(summarise(shared))
    return values


def site_evaluation(
    run: RunConfig,
    policy: SitePolicy,
    round: int,
    values: Mapping[str, float],
    scores: Sequence[PatientScore],
    bins: Bins,
    pictures: tuple[bytes, ...],
    is_last: bool,
) -> SiteEvaluation:
    """Return what may leave: labelled means; single patients, pictures and calibration of data that may be shown.

    Where the figures are suppressed this is not asked: `private_answers.suppressed_evaluation` is the answer.
    """
    may_show = policy.declared != "private"
    return SiteEvaluation(
        hospital=policy.hospital,
        round=round,
        metrics=labelled(values, policy.declared, run.privacy.enable_dp),
        patient_scores=tuple(score.headline for score in scores) if may_show else None,
        pictures=pictures if may_show else (),
        intervals=intervals_of(run, scores) if is_last else None,
        patients=tuple(score.figures for score in scores) if is_last and may_show else None,
        calibration=dict(bins) if bins and may_show else None,
    )


def intervals_of(run: RunConfig, scores: Sequence[PatientScore]) -> Intervals:
    """Return 95 % bootstrap intervals over the patients, of every figure."""
    if not scores:
        return {}
    if scores[0].dice is None:
        return bootstrap_intervals(scores)
    return intervals_of_means([score.figures for score in scores], run.federation.seed)
