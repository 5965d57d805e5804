"""Deciding, before any hospital trains, what each will do: steps, sampling rates, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medfl_ray.config import RunConfig
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.planner import solve_noise_multiplier
from medfl_ray.site_policy import SitePolicy


def sample_rate(run: RunConfig, policy: SitePolicy) -> float:
    """Return q, from the configuration or from batch size and the public number of patients."""
    if run.privacy.sample_rate is not None:
        return run.privacy.sample_rate
    return min(1.0, run.training.batch_size / policy.num_patients)


def steps_per_round(run: RunConfig, policy: SitePolicy) -> int:
    """Return the local steps of one round; under DP an epoch is 1 / q steps in expectation."""
    if run.federation.local_steps is not None:
        return run.federation.local_steps
    epochs = run.federation.local_epochs or 1.0
    if run.privacy.patient_level:
        return max(1, math.ceil(epochs / sample_rate(run, policy)))
    return max(1, math.ceil(epochs * policy.num_patients / run.training.batch_size))


def delta_of(run: RunConfig, policy: SitePolicy) -> float:
    """Return the delta of the run's epsilon: the site's, else the run's, else min(1e-5, 1 / (10 N))."""
    if policy.delta is not None or run.privacy.delta is None:
        return policy.effective_delta
    return run.privacy.delta


def account_delta(run: RunConfig, policy: SitePolicy) -> float:
    """Return the delta of a data set's lifetime account.

    A declared budget keeps the site's delta: a run that asked for a larger one would make everything
    spent before look cheaper, and so stretch the budget.
    """
    return policy.effective_delta if policy.max_epsilon is not None else delta_of(run, policy)


def is_for_one_run(policy: SitePolicy) -> bool:
    """Say whether only the first run may spend on a data set: it is private and nobody has declared its budget."""
    return policy.declared == "private" and policy.max_epsilon is None


def budget_of(run: RunConfig, policy: SitePolicy) -> float | None:
    """Return the lifetime epsilon budget of a hospital's data set.

    Private data without a declared budget get the run's epsilon, and a second run is refused until
    somebody decides; public and synthetic data have no lifetime budget unless one is declared.
    """
    if policy.max_epsilon is not None or policy.declared != "private":
        return policy.max_epsilon
    return run.privacy.epsilon


def mechanism_for(run: RunConfig, policy: SitePolicy, num_rounds: int | None = None) -> Mechanism | None:
    """Return one round's mechanism at a hospital, or None with patient-level DP off.

    Raises:
      PrivacyConfigError: the site requires DP or more noise than the run adds, the private data set has
        no budget at all, or its delta is not below 1 / num_patients.
    """
    if not run.privacy.patient_level:
        if policy.require_dp:
            raise PrivacyConfigError(
                f"hospital {policy.hospital!r} trains only with differential privacy; set privacy.enable_dp: true"
            )
        return None
    q, steps, delta = sample_rate(run, policy), steps_per_round(run, policy), delta_of(run, policy)
    if delta >= 1 / policy.num_patients:
        raise PrivacyConfigError(
            f"delta={delta:g} is not below 1 / num_patients = {1 / policy.num_patients:g} of hospital "
            f"{policy.hospital!r}; lower privacy.delta"
        )
    if policy.declared == "private" and budget_of(run, policy) is None:
        raise PrivacyConfigError(
            f"hospital {policy.hospital!r} has private data and no budget; declare max_epsilon in its site policy "
            "or privacy.epsilon in the run"
        )
    sigma = run.privacy.noise_multiplier
    if sigma is None:
        assert run.privacy.epsilon is not None  # the schema asks for one of the two
        sigma = solve_noise_multiplier(run.privacy.epsilon, delta, q, steps * (num_rounds or run.federation.rounds))
    if policy.min_noise_multiplier is not None and sigma < policy.min_noise_multiplier:
        raise PrivacyConfigError(
            f"hospital {policy.hospital!r} requires noise_multiplier >= {policy.min_noise_multiplier:g}; "
            f"this run would use {sigma:.3g}. Lower privacy.epsilon or raise privacy.noise_multiplier."
        )
    return Mechanism(
        noise_multiplier=sigma,
        sample_rate=q,
        max_grad_norm=run.privacy.max_grad_norm,
        num_steps=steps,
        num_patients=policy.num_patients,
        delta=delta,
    )


def aggregation_weight(run: RunConfig, num_patients: int) -> int:
    """Return the integer weight of a hospital's update; never counted from files."""
    return num_patients if run.aggregation.weighting == "patients" else 1


def mechanisms(run: RunConfig, policies: Sequence[SitePolicy]) -> dict[str, Mechanism]:
    """Return each hospital's mechanism of one round; empty with DP off."""
    planned = {policy.hospital: mechanism_for(run, policy) for policy in policies}
    return {hospital: mechanism for hospital, mechanism in planned.items() if mechanism is not None}
