"""Deciding, before any hospital trains, what each will do: steps, sampling rates, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medfl_ray.aggregation.robust import why_too_few
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, PrivacyConfigError
from medfl_ray.federation.selection import num_wanted
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.account import extra_limit
from medfl_ray.privacy.planner import solve_noise_multiplier


def sample_rate(run: RunConfig, policy: SitePolicy) -> float:
    """Return q, from the configuration or from batch size and the public number of patients."""
    if run.privacy.sample_rate is not None:
        return run.privacy.sample_rate
    return min(1.0, run.training.batch_size / policy.num_patients)


def steps_per_round(run: RunConfig, policy: SitePolicy) -> int:
    """Return the local steps of the first round; under DP an epoch is 1 / q steps in expectation."""
    federation = run.federation
    if federation.local_steps is not None:
        return min(federation.local_steps, federation.max_local_steps or federation.local_steps)
    epochs = federation.local_epochs or 1.0
    if run.privacy.patient_level:
        steps = math.ceil(epochs / sample_rate(run, policy))
    else:
        steps = math.ceil(epochs * policy.num_patients / run.training.batch_size)
    return max(1, min(steps, federation.max_local_steps or steps))


def steps_in_round(run: RunConfig, first: int, number: int) -> int:
    """Return the local steps of a round, counted from 1, of a hospital that takes `first` in the first round.

    Fewer steps late keep hospitals from drifting apart near the optimum (Wang and Joshi 2019, arXiv:1810.08313, who
    follow the loss; here the round's number decides, which tells nothing of patients).
    """
    if run.federation.local_steps_schedule == "constant":
        return first
    return max(1, math.ceil(first / math.sqrt(number)))


def steps_of_run(run: RunConfig, first: int, num_rounds: int | None = None) -> int:
    """Return the local steps of all rounds together."""
    return sum(steps_in_round(run, first, number) for number in range(1, (num_rounds or run.federation.rounds) + 1))


def mechanism_in_round(run: RunConfig, first: Mechanism, number: int) -> Mechanism:
    """Return the mechanism of a round, of a hospital that has `first` in the first round."""
    return first.model_copy(update={"num_steps": steps_in_round(run, first.num_steps, number)})


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

    Private data without a declared budget get what the run may spend, extra epsilon included, and a second run is
    refused until somebody decides; public and synthetic data have no lifetime budget unless one is declared.
    """
    if policy.max_epsilon is not None or policy.declared != "private" or run.privacy.epsilon is None:
        return policy.max_epsilon
    return run.privacy.epsilon + (run.privacy.extra_epsilon or 0.0)


def check_limits(policy: SitePolicy, task: str, num_steps: int, mechanism: Mechanism | None) -> None:
    """Check one round against what a hospital allows; asked when a run is planned, and by the hospital itself.

    Raises:
      PrivacyConfigError: the site does not allow the task, as many steps, as large a clip norm or as little noise.
    """
    who = f"hospital {policy.hospital!r}"
    if policy.allowed_tasks is not None and task not in policy.allowed_tasks:
        allowed = " and ".join(policy.allowed_tasks) or "nothing"
        raise PrivacyConfigError(f"{who} allows {allowed}; this run's data.task is {task!r}: leave the hospital out")
    if policy.max_steps_per_round is not None and num_steps > policy.max_steps_per_round:
        raise PrivacyConfigError(
            f"{who} allows {policy.max_steps_per_round} steps in a round; this run would take {num_steps}. Lower "
            "federation.local_steps or local_epochs"
        )
    if mechanism is None:
        return
    if policy.max_grad_norm is not None and mechanism.max_grad_norm > policy.max_grad_norm:
        raise PrivacyConfigError(
            f"{who} allows a clip norm of at most {policy.max_grad_norm:g}; this run's is "
            f"{mechanism.max_grad_norm:g}: lower privacy.max_grad_norm"
        )
    floor = policy.min_noise_multiplier
    if floor is not None and mechanism.noise_multiplier < floor:
        raise PrivacyConfigError(
            f"{who} requires noise_multiplier >= {floor:g}; this run would use {mechanism.noise_multiplier:.3g}. "
            "Lower privacy.epsilon or raise privacy.noise_multiplier"
        )


def check_terms(run: RunConfig, policy: SitePolicy, mechanism: Mechanism) -> None:
    """Check in what terms a plan charges a hospital, by the hospital itself: as other terms the same noise costs less.

    Raises:
      PrivacyConfigError: the unit is not the patient, the adjacency not add/remove, or delta not the run's here.
    """
    expected = ("patient", "add_remove", delta_of(run, policy))
    if (mechanism.unit, mechanism.adjacency, mechanism.delta) != expected:
        raise PrivacyConfigError(
            f"the plan charges {policy.hospital!r} at {mechanism.unit} level, {mechanism.adjacency} adjacency and "
            f"delta={mechanism.delta:g}; its patients are charged at patient level, add_remove and "
            f"delta={expected[2]:g}"
        )


def check_account(run: RunConfig, policy: SitePolicy) -> None:
    """Check that patients can be charged at all; asked when a run is planned, and by the hospital itself.

    Raises:
      PrivacyConfigError: delta is not below 1 / num_patients, or private data have no budget anywhere.
    """
    delta = delta_of(run, policy)
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


def check_may_be_unprotected(policy: SitePolicy, has_charges: bool = False) -> None:
    """Refuse to train without patient-level differential privacy where a policy, a budget or a charge forbids it.

    A budget that bound only runs with differential privacy would bind nobody: raw updates reveal more than any charge.

    Args:
      has_charges: whether the data set's ledger holds charges, which the hospital alone knows.

    Raises:
      PrivacyConfigError: with the reason and what to change.
    """
    who = f"hospital {policy.hospital!r}"
    if policy.require_dp:
        raise PrivacyConfigError(
            f"{who} trains only with differential privacy of its patients; set privacy.enable_dp: true and unit: "
            "patient, or leave the hospital out"
        )
    if policy.declared != "private" or policy.allow_unprotected:
        return
    if policy.max_epsilon is not None or has_charges:
        why = "a budget (max_epsilon)" if policy.max_epsilon is not None else "charges in its ledger"
        raise PrivacyConfigError(
            f"{who} has private data with {why}, so that it trains only with patient-level differential privacy; set "
            "privacy.enable_dp: true and unit: patient. A hospital that gives the protection up says so in its own "
            "policy: privacy.allow_unprotected: true, and its epsilon is infinite from then on"
        )


def extra_budget(run: RunConfig, policy: SitePolicy) -> float | None:
    """Return the epsilon that a run's baselines and studies may spend together at a hospital; None for no limit."""
    return extra_limit(run, policy.declared)


def mechanism_for(run: RunConfig, policy: SitePolicy, num_rounds: int | None = None) -> Mechanism | None:
    """Return the first round's mechanism at a hospital, or None with patient-level DP off.

    Raises:
      PrivacyConfigError: the site requires DP, or does not allow what the run asks (see `check_limits`), the
        private data set has no budget at all, or its delta is not below 1 / num_patients.
    """
    if not run.privacy.patient_level:
        check_may_be_unprotected(policy)
        check_limits(policy, run.data.task, steps_per_round(run, policy), None)
        return None
    check_account(run, policy)
    q, steps, delta = sample_rate(run, policy), steps_per_round(run, policy), delta_of(run, policy)
    sigma = run.privacy.noise_multiplier
    if sigma is None:
        assert run.privacy.epsilon is not None  # the schema asks for one of the two
        sigma = solve_noise_multiplier(run.privacy.epsilon, delta, q, steps_of_run(run, steps, num_rounds))
    mechanism = Mechanism(
        noise_multiplier=sigma,
        sample_rate=q,
        max_grad_norm=run.privacy.max_grad_norm,
        num_steps=steps,
        num_records=policy.num_patients,
        delta=delta,
    )
    check_limits(policy, run.data.task, steps, mechanism)
    return mechanism


def aggregation_weight(run: RunConfig, policy: SitePolicy) -> int:
    """Return the integer weight of a hospital's update, from its public declarations; never counted from files."""
    if run.aggregation.weighting == "uniform":
        return 1
    if run.aggregation.weighting == "cases" and policy.num_cases is not None:
        return policy.num_cases
    return policy.num_patients


def check_rule(run: RunConfig, num_hospitals: int) -> None:
    """Refuse a robust rule that needs more updates than a round of the run can have.

    Raises:
      ConfigError: that is so.
    """
    most = num_wanted(num_hospitals, run.federation.fraction)
    problem = why_too_few(run.aggregation.robust, most) if run.aggregation.mode == "robust" else None
    if problem is not None:
        raise ConfigError(f"a round of this run has at most {most} updates. {problem}")


def mechanisms(run: RunConfig, policies: Sequence[SitePolicy]) -> dict[str, Mechanism]:
    """Return each hospital's mechanism of the first round; empty with DP off."""
    planned = {policy.hospital: mechanism_for(run, policy) for policy in policies}
    return {hospital: mechanism for hospital, mechanism in planned.items() if mechanism is not None}
