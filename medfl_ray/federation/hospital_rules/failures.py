"""Failures of hospitals that every pool reports in the same words."""

from __future__ import annotations

from medfl_ray.errors import ConfigError, MedflError, ModelError, PrivacyConfigError
from medfl_ray.messages import ClientFailure, RoundPlan

CONFIG_FAULTS = (ConfigError, ModelError, PrivacyConfigError)


def start_failure(hospital: str, problem: str | MedflError, round: int = 0, attempt: int = 0) -> ClientFailure:
    """Say that a hospital could not start, or start again within a round."""
    return ClientFailure(
        hospital=hospital,
        round=round,
        attempt=attempt,
        stage="start",
        reason=str(problem),
        may_have_left=False,
        config_fault=isinstance(problem, CONFIG_FAULTS),
    )


def evaluation_failure(hospital: str, round: int, reason: str) -> ClientFailure:
    """Say why a hospital did not score the weights."""
    return ClientFailure(
        hospital=hospital, round=round, attempt=0, stage="evaluate", reason=reason, may_have_left=False
    )


def deadline_failure(hospital: str, plan: RoundPlan) -> ClientFailure:
    """Say that a hospital's answer did not arrive in time; its privacy cost stays spent."""
    return ClientFailure(
        hospital=hospital,
        round=plan.round,
        attempt=plan.attempt,
        stage="late",
        reason=f"no update within deadline_s={plan.deadline_s:g}; the round closed without it and its cost stays spent",
    )


def in_constant_words(failure: ClientFailure) -> ClientFailure:
    """Return why a hospital did not score: what its process was busy with would tell that it was asked to train."""
    return failure.model_copy(update={"reason": "it did not score the weights", "transient": False})
