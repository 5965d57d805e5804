"""What an audit of a run attacks: the mechanism of the hospital that spent most, over the steps that it ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.planning import mechanisms, steps_in_round
from medfl_ray.messages import Mechanism, RoundResult
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.privacy.audit_record import AuditedEpsilon, MechanismAudit

FEWEST_CANARIES, USUAL_CANARIES, MAX_CANARIES = 1_000, 10_000, 60_000
MAX_DRAWS = 1_100_000
"""Canary gradients that one audit clips by default: less than a minute on one core."""
ROOM = 8.0
"""Canaries per e^epsilon, so that flawless guesses would refute the claim."""
SMALLER = 10
"""The claim is tested at its delta and at a tenth of it. A mechanism has a claim at every delta, and at the larger
delta of the claim itself a few lucky losses could explain many right guesses."""


@dataclass(frozen=True)
class AuditSubject:
    """One mechanism, the steps of the run, the hospitals that ran them, and what is claimed: (delta, epsilon) twice."""

    hospitals: tuple[str, ...]
    mechanism: Mechanism
    num_steps: int
    claims: tuple[tuple[float, float], tuple[float, float]]


def audit_subject(run: RunConfig, policies: Sequence[SitePolicy], results: Sequence[RoundResult]) -> AuditSubject:
    """Choose what to audit in a run with DP: the mechanism with the largest claim.

    The claim is the accountant's for the steps whose updates left the hospital, or the receipts' where that is
    smaller: what the report shows must hold.

    Raises:
      PrivacyConfigError: nothing was trained under DP.
    """
    groups: dict[tuple[float, float, float, int, float], list[str]] = {}
    planned, spent = mechanisms(run, policies), {h: s for r in results for h, s in r.receipt.spent.items()}
    for hospital, mechanism in planned.items():
        rounds = {(r.round, r.receipt.attempt) for r in results if hospital in r.receipt.trained}
        if rounds and hospital in spent:
            sigma, q, norm = mechanism.noise_multiplier, mechanism.sample_rate, mechanism.max_grad_norm
            steps = sum(steps_in_round(run, mechanism.num_steps, number) for number, _ in rounds)
            groups.setdefault((sigma, q, norm, steps, spent[hospital].delta), []).append(hospital)
    if not groups:
        raise PrivacyConfigError(
            "no hospital of this run has trained under differential privacy, so that there is no claim to audit; "
            "give the folder of a run with privacy.enable_dp: true and at least one round"
        )
    largest = max(groups, key=lambda key: epsilon_spent([Segment(key[0], key[1], key[3])], key[4]))
    sigma, q, _, steps, delta = largest
    hospitals = tuple(sorted(groups[largest]))
    shown = min(spent[hospital].epsilon for hospital in hospitals)
    segment = [Segment(sigma, q, steps)]
    claim, smaller = min(shown, epsilon_spent(segment, delta)), epsilon_spent(segment, delta / SMALLER)
    claims = ((delta, claim), (delta / SMALLER, smaller))
    return AuditSubject(hospitals, planned[hospitals[0]], steps, claims)


def enough_canaries(subject: AuditSubject) -> int:
    """Return how many canaries an audit takes by default: enough to refute the claim, within a minute."""
    wanted = ROOM * math.exp(min(20.0, subject.claims[-1][1]))
    affordable = 2 * MAX_DRAWS / (subject.num_steps * subject.mechanism.sample_rate)
    return int(max(FEWEST_CANARIES, min(max(wanted, USUAL_CANARIES), affordable, MAX_CANARIES)))


def audit_mechanism(subject: AuditSubject, num_canaries: int, confidence: float) -> MechanismAudit:
    """Run canaries through the mechanism and compare what they prove with what is claimed.

    Raises:
      PrivacyConfigError: too few canaries, or a confidence outside (0, 1).
    """
    from medfl_ray.privacy.auditing import audit_bounds, gaussian_canary_epsilon
    from medfl_ray.privacy.canaries import run_canaries

    mechanism = subject.mechanism
    scores = run_canaries(mechanism, subject.num_steps, num_canaries)
    (delta, _), (smaller, _) = subject.claims
    bounds = audit_bounds(scores.likelihoods, scores.included, delta, smaller, confidence)
    estimate = gaussian_canary_epsilon(scores.sums[scores.included], scores.sums[~scores.included], delta)
    return MechanismAudit(
        hospitals=subject.hospitals,
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=mechanism.sample_rate,
        max_grad_norm=mechanism.max_grad_norm,
        num_steps=subject.num_steps,
        num_canaries=num_canaries,
        confidence=confidence,
        at=tuple(
            AuditedEpsilon(
                delta=bound.delta,
                claimed=claimed,
                lower_bound=bound.epsilon,
                ceiling=bound.ceiling,
                num_guessed=bound.guesses.num_guessed,
                num_correct=bound.guesses.num_correct,
            )
            for (_, claimed), bound in zip(subject.claims, bounds, strict=True)
        ),
        gaussian_estimate=estimate if math.isfinite(estimate) else None,
    )
