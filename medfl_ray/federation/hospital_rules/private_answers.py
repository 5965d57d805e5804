"""What may leave a hospital beside charged updates when something is asked of its private data, or goes wrong there.

One gate for every reason of a failure, one constant answer for every evaluation whose figures are suppressed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import structlog

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import MedflError, PrivacyError
from medfl_ray.federation.hospital_rules.labels import label_for
from medfl_ray.messages import FailureStage, Metric, SiteEvaluation
from medfl_ray.training.scoring.evaluation import headline_of_shared, metric_names

log = structlog.get_logger()


class ScoringRecord(Protocol):
    """Which model was scored for which purpose; see medfl_ray/store/run/scoring_record.py."""

    def admit(self, purpose: str, checksum: str) -> bool:
        """Note durably that a model is scored for a purpose; False where another one was, or this one to the end."""

    def finish(self, purpose: str, checksum: str) -> None:
        """Note that it was scored to the end."""


def is_confidential(policy: SitePolicy) -> bool:
    """Whether nothing of the data may leave but what is public, charged or suppressed: they are declared private."""
    return policy.declared == "private"


def shown_reason(policy: SitePolicy, error: Exception, stage: FailureStage, round: int = 0) -> str:
    """Return why something failed, in the words that may leave the hospital; the rest goes to its own log.

    Of private data, one constant sentence: which error it was, or of which case, would tell of a patient. Errors of
    the privacy account pass, since they are computed from run, policy and ledger.
    """
    if isinstance(error, PrivacyError) or (isinstance(error, MedflError) and not is_confidential(policy)):
        return str(error)
    if not is_confidential(policy):
        log.error("hospital_failed", hospital=policy.hospital, stage=stage, round=round, exc_info=error)
        return f"{type(error).__name__} in the hospital's process; its own log has the details"
    known = {"problem": str(error)} if isinstance(error, MedflError) else {"exc_info": error}
    log.error("hospital_failed_on_private_data", hospital=policy.hospital, stage=stage, round=round, **known)
    return (
        "the work on this hospital's private data failed; what it was stands in the hospital's own log. "
        "Run medfl-ray data inspect at the hospital"
    )


def is_suppressed(run: RunConfig, policy: SitePolicy) -> bool:
    """Whether figures of the hospital's data lose their value before they leave."""
    return label_for(policy.declared, run.privacy.enable_dp) == "suppressed"


def suppressed_evaluation(
    run: RunConfig, policy: SitePolicy, labels: Mapping[int, str], round: int, is_last: bool
) -> SiteEvaluation:
    """Return the one answer to every request for scores that are suppressed: computed from run and names alone."""
    names = suppressed_names(run, labels, is_last, shared=bool(round) and run.aggregation.is_personal)
    metrics = {name: Metric(value=None, label="suppressed") for name in names}
    return SiteEvaluation(hospital=policy.hospital, round=round, metrics=metrics)


def suppressed_names(run: RunConfig, labels: Mapping[int, str], is_last: bool, shared: bool) -> tuple[str, ...]:
    """Return every name that a figure of the evaluation may have, whatever patients there are."""
    names = metric_names(run.data.task, labels)
    if shared:
        names = (*names, *headline_of_shared(dict.fromkeys(names, math.nan)))
    if is_last and run.evaluation.more_metrics:
        from medfl_ray.training.scoring.segmentation_metrics import figure_names

        names += figure_names(labels, run.evaluation.more_metrics)
    return names
