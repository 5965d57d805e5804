"""What a hospital holds a coordinator to: the jobs, rounds and steps of the run that it agreed to, and no others.

The coordinator refuses the same when it plans. A hospital does not rely on that: whoever asks it directly may have
planned nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import ValidationError

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.planning import (
    check_account,
    check_limits,
    check_may_be_unprotected,
    check_terms,
    extra_budget,
    sample_rate,
    steps_in_round,
    steps_per_round,
)
from medfl_ray.messages import Mechanism, RoundPlan

COALITION = re.compile(r"coalition-\d+-of-\d+-rounds-[0-9a-f]{12}")
ROUNDING = 1e-9
"""Relative difference by which two machines may solve for the same noise."""


class Agreement:
    """One run at one hospital, as the hospital's own copy of the run says it."""

    def __init__(self, run: RunConfig, policy: SitePolicy, job: str = "", pooled: Sequence[SitePolicy] = ()) -> None:
        """Take the run and the hospital's own policy.

        Args:
          job: the run's; when empty, the first one that asks to train is taken, and no other after it.
          pooled: the policies of the hospitals whose data the central baseline pools; only it takes part in nothing
            but the central baseline.
        """
        self._run, self._policy, self._job = run, policy, job
        self._members = tuple(pooled) or (policy,)
        self._is_pooled = bool(pooled)

    @property
    def job(self) -> str:
        """The run's job; empty as long as nobody has asked to train."""
        return self._job

    def check_plan(self, plan: RoundPlan) -> None:
        """Refuse a job, a round or a number of steps that the agreed run does not plan.

        Raises:
          PrivacyConfigError: with what was asked and what was agreed.
        """
        run_job, slash, kind = plan.job.partition("/")
        if self._job and run_job != self._job:
            raise PrivacyConfigError(
                f"job {plan.job!r} is not of the run that hospital {self._policy.hospital!r} agreed to "
                f"({self._job!r}); a run keeps its name, and another run is another agreement"
            )
        rounds = None if slash and not kind else self._rounds_of(kind)
        if rounds is None:
            raise PrivacyConfigError(
                f"job {plan.job!r} trains what the run that hospital {self._policy.hospital!r} agreed to does not "
                "plan; name it in federation.baselines or evaluation of the run file on both sides"
            )
        if not 1 <= plan.round <= rounds:
            raise PrivacyConfigError(
                f"round {plan.round} of job {plan.job!r} is outside the {rounds} rounds that the run plans"
            )
        allowed = self._steps_in_round(plan.round)
        asked = plan.num_steps.get(self._policy.hospital)
        if asked is None or not 1 <= asked <= allowed:
            raise PrivacyConfigError(
                f"the plan of round {plan.round} asks hospital {self._policy.hospital!r} for {asked} steps; the run "
                f"plans {allowed}"
            )
        self._job = run_job

    def check_baseline(self, plans: Sequence[RoundPlan]) -> None:
        """Refuse a baseline that is none: without rounds, or under the job of the run itself.

        Raises:
          PrivacyConfigError: with what was asked.
        """
        numbers = [plan.round for plan in plans]
        if not plans or any("/" not in plan.job for plan in plans) or len(set(numbers)) < len(numbers):
            raise PrivacyConfigError(
                f"hospital {self._policy.hospital!r} is asked for a baseline without rounds, with one of them twice, "
                "or under the job of the run itself; a baseline has a job of its own"
            )

    def check_mechanism(self, plan: RoundPlan) -> Mechanism | None:
        """Return the mechanism that a plan charges this hospital; None without patient-level differential privacy.

        Raises:
          PrivacyConfigError: it is missing, or not the one that run and policy lead to.
        """
        run, policy = self._run, self._policy
        mechanism = plan.mechanisms.get(policy.hospital)
        if run.privacy.hospital_dp and plan.clip_norm is None:
            raise PrivacyConfigError(f"the plan of round {plan.round} has no clip norm, which privacy.unit asks for")
        if mechanism is not None and not run.privacy.patient_level:
            raise PrivacyConfigError(
                f"the plan of round {plan.round} charges {policy.hospital!r} a patient-level mechanism; the run that "
                "it agreed to has none, and what such a run sends is not noised"
            )
        if mechanism is None:
            if policy.require_dp or run.privacy.patient_level:
                raise PrivacyConfigError(
                    f"the plan of round {plan.round} has no privacy mechanism for {policy.hospital!r}"
                )
            check_limits(policy, run.data.task, plan.num_steps[policy.hospital], None)
            return None
        self._check_declared(plan, mechanism)
        check_terms(run, policy, mechanism)
        check_account(run, policy)
        check_limits(policy, run.data.task, plan.num_steps[policy.hospital], mechanism)
        return mechanism

    def check_unprotected(self, has_charges: bool) -> None:
        """Refuse training, or figures, without patient-level differential privacy where it is due.

        Raises:
          PrivacyConfigError: with the reason.
        """
        check_may_be_unprotected(self._policy, has_charges)

    def budget_of(self, job: str) -> float | None:
        """Return the epsilon that a job may spend: the run's for its rounds, the extra one for all beside them."""
        return self._run.privacy.epsilon if "/" not in job else extra_budget(self._run, self._policy)

    def _check_declared(self, plan: RoundPlan, mechanism: Mechanism) -> None:
        try:
            Mechanism.model_validate(mechanism.model_dump())  # in one process, or over Ray, nothing has parsed it
        except ValidationError:
            raise PrivacyConfigError(
                f"the mechanism of the plan of round {plan.round} has a figure outside its range, or one that is no "
                "number"
            ) from None
        policy, given = self._policy, self._run.privacy.noise_multiplier
        if mechanism.num_records != policy.num_patients:
            raise PrivacyConfigError(
                f"the plan assumes {mechanism.num_records} patients at {policy.hospital!r}; "
                f"its policy declares {policy.num_patients}"
            )
        if mechanism.num_steps != plan.num_steps[policy.hospital]:
            raise PrivacyConfigError(
                f"the plan asks {policy.hospital!r} for {plan.num_steps[policy.hospital]} steps and its mechanism "
                f"charges {mechanism.num_steps}; every step that is trained must be charged"
            )
        rate = max(sample_rate(self._run, member) for member in self._members)
        if mechanism.sample_rate > rate * (1 + ROUNDING):
            raise PrivacyConfigError(
                f"the plan samples patients of {policy.hospital!r} at rate {mechanism.sample_rate:g}; the run says "
                f"{rate:g}"
            )
        if mechanism.max_grad_norm != self._run.privacy.max_grad_norm:
            raise PrivacyConfigError(
                f"the plan clips patients of {policy.hospital!r} at {mechanism.max_grad_norm:g}; the run says "
                f"{self._run.privacy.max_grad_norm:g}"
            )
        if given is not None and mechanism.noise_multiplier < given * (1 - ROUNDING):
            raise PrivacyConfigError(
                f"the plan adds noise_multiplier {mechanism.noise_multiplier:g} at {policy.hospital!r}; the run says "
                f"{given:g}"
            )

    def _rounds_of(self, kind: str) -> int | None:
        """Return how many rounds a kind of job has; None where the run has no such job for this hospital."""
        run = self._run
        if self._is_pooled:
            return run.federation.rounds if kind == "central" and "central" in run.federation.baselines else None
        if kind == "":
            return run.federation.rounds
        if kind == "local" and ("local" in run.federation.baselines or run.evaluation.cross_site):
            return run.federation.rounds
        studies = run.evaluation.leave_one_out or run.evaluation.contributions is not None
        if studies and COALITION.fullmatch(kind):
            return run.evaluation.study_rounds or run.federation.rounds
        return None

    def _steps_in_round(self, number: int) -> int:
        return sum(steps_in_round(self._run, steps_per_round(self._run, member), number) for member in self._members)
