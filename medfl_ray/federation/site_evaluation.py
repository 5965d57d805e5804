"""What a hospital says of given weights: which figures it computes, and which of them may leave it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from medfl_ray.config import RunConfig
from medfl_ray.federation.labels import label_for, labelled
from medfl_ray.messages import ReliabilityBins, SiteEvaluation
from medfl_ray.params import Vector
from medfl_ray.site_policy import SitePolicy
from medfl_ray.training.evaluation import PatientScore, headline_of_shared, metric_names, summarise
from medfl_ray.training.intervals import Intervals, bootstrap_intervals, intervals_of_means

if TYPE_CHECKING:  # the driver of a simulation, which names this room, must not spend its time and memory on torch
    from medfl_ray.data.dataset import HospitalData
    from medfl_ray.training.trainer import Trainer

Bins = Mapping[str, ReliabilityBins]


def score_patients(
    trainer: Trainer, weights: Vector, data: HospitalData, run: RunConfig, is_last: bool
) -> tuple[list[PatientScore], Bins]:
    """Score the held-out patients; at the last evaluation with every figure that the run asks for."""
    if not is_last or not run.evaluation.is_full:
        return trainer.evaluate(weights, data), {}
    from medfl_ray.training.final_evaluation import evaluate_fully

    full = evaluate_fully(trainer, weights, data, run)
    return full.scores, full.bins


def figures_of(
    run: RunConfig,
    policy: SitePolicy,
    labels: Mapping[int, str],
    scores: Sequence[PatientScore],
    is_last: bool,
    shared: Sequence[PatientScore] | None = None,
) -> dict[str, float]:
    """Return the means over the patients; of confidential data under every name that there may be.

    Which figures there are would tell of the held-out patients. `shared` are the shared model's scores where `scores`
    are of the hospital's own; of them the headline alone is shown.
    """
    values = summarise(scores)
    if shared is not None:
        values |= headline_of_shared(summarise(shared))
    if label_for(policy.declared, run.privacy.enable_dp) != "suppressed":
        return values
    names = metric_names(run.data.task, labels)
    if shared is not None:
        names = (*names, *headline_of_shared(dict.fromkeys(names, math.nan)))
    if is_last and run.evaluation.more_metrics:
        from medfl_ray.training.segmentation_metrics import figure_names

        names += figure_names(labels, run.evaluation.more_metrics)
    return dict.fromkeys(names, math.nan) | values


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
    """Return what may leave: labelled means; single patients, pictures and calibration of data that may be shown."""
    may_show = policy.declared != "private"
    suppressed = label_for(policy.declared, run.privacy.enable_dp) == "suppressed"
    return SiteEvaluation(
        hospital=policy.hospital,
        round=round,
        metrics=labelled(values, policy.declared, run.privacy.enable_dp),
        patient_scores=tuple(score.headline for score in scores) if may_show else None,
        pictures=pictures if may_show else (),
        intervals=intervals_of(run, scores) if is_last and not suppressed else None,
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
