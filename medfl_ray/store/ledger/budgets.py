"""What an account of the privacy ledger may still be charged, decided from its rows alone; nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medfl_ray.errors import BudgetExceeded, LedgerError, PrivacyConfigError
from medfl_ray.messages import Mechanism, PrivacyUnit
from medfl_ray.privacy.accountant import Charge, check_delta, epsilon_spent
from medfl_ray.store.ledger.events import (
    LedgerEvent,
    charge_of,
    charged_segments,
    charges,
    labels_of,
    unprotected_jobs,
)

Account = tuple[str, str]
MORE_NOISE = "Raise privacy.noise_multiplier or lower federation.rounds."


@dataclass(frozen=True, kw_only=True)
class AccountTerms:
    """What a hospital allows on one data set over its life; see `PrivacyLedger.open` for each field.

    Raises:
      PrivacyConfigError: delta lies outside (0, 1), or max_epsilon is not above 0.
    """

    delta: float
    max_epsilon: float | None = None
    one_run: bool = False
    max_steps: int | None = None
    unit: PrivacyUnit = "patient"
    allow_unprotected: bool = False

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise PrivacyConfigError(f"max_epsilon is {self.max_epsilon!r}; it must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class ChargeRequest:
    """One charge that somebody wants to reserve; `budget` is the job's, as epsilon at the mechanism's delta."""

    job: str
    round: int
    attempt: int
    mechanism: Mechanism
    budget: float | None

    @property
    def segment(self) -> Charge:
        """What the accountant is to charge."""
        of = self.mechanism
        return charge_of(of.adjacency, of.noise_multiplier, of.sample_rate, of.num_steps)


def check_request(terms: AccountTerms, account: Account, rows: Sequence[LedgerEvent], wanted: ChargeRequest) -> None:
    """Refuse a charge of another unit, one that was made before, and one that a budget does not allow.

    Raises:
      LedgerError: another unit, or charged already.
      BudgetExceeded: see `check_budgets`; or another run's account, or too many steps.
    """
    _refuse_other_unit(terms, account, rows, wanted.mechanism)
    _refuse_twice(rows, wanted)
    _refuse_second_run(terms, account, rows, wanted.job)
    _refuse_more_steps(terms, account, rows, wanted.mechanism.num_steps)
    check_budgets(terms, account, rows, wanted)


def check_budgets(terms: AccountTerms, account: Account, rows: Sequence[LedgerEvent], wanted: ChargeRequest) -> None:
    """Refuse a charge that the data set's lifetime budget, or the job's, does not allow.

    Raises:
      BudgetExceeded: with the epsilon that would be reached; or because the account is unprotected.
    """
    segment, unprotected = wanted.segment, unprotected_jobs(rows)
    if terms.max_epsilon is not None and not (unprotected and terms.allow_unprotected):
        limit = Limit("hospital", terms.max_epsilon, terms.delta, MORE_NOISE)
        if unprotected:
            raise _unprotected(account, limit, wanted.mechanism)
        _refuse_more(account, limit, (*charged_segments(rows), segment), wanted.mechanism)
    if wanted.budget is not None:
        limit = _limit_of_job(wanted.job, wanted.budget, wanted.mechanism.delta)
        if any(is_counted_with(job, wanted.job) for job in unprotected):
            raise _unprotected(account, limit, wanted.mechanism)
        counted = [row.segment for row in charges(rows) if is_counted_with(row.job or "", wanted.job)]
        _refuse_more(account, limit, (*counted, segment), wanted.mechanism)


def check_charged(row: LedgerEvent, mechanism: Mechanism) -> None:
    """Refuse to train with anything but what a row has charged.

    Raises:
      LedgerError: names the fields that differ.
    """
    wanted = mechanism.model_dump()
    different = sorted(name for name, value in wanted.items() if getattr(row, name) != value)
    if different:
        seen = ", ".join(f"{name} {wanted[name]!r} where {getattr(row, name)!r} was charged" for name in different)
        raise LedgerError(
            f"job {row.job!r}, round {row.round}, attempt {row.attempt} would train with {seen} (row {row.sequence}). "
            "Nothing is trained that was not charged: reserve what is to be trained"
        )


def is_counted_with(job: str, wanted: str) -> bool:
    """Say whether a job counts against the budget of another: a run against itself, all jobs beside it together."""
    if "/" not in wanted:
        return job == wanted
    return "/" in job and run_of(job) == run_of(wanted)


def run_of(job: str) -> str:
    """Return the run that a job belongs to: its baselines are charged as <run>/local and <run>/central."""
    return job.split("/", maxsplit=1)[0]


@dataclass(frozen=True)
class Limit:
    """A budget: whose it is, its epsilon at a delta, and what to change where it is too small."""

    subject: str
    epsilon: float
    delta: float
    advice: str

    def terms_with(self, mechanism: Mechanism) -> str:
        """Say the limit with all that belongs to an epsilon."""
        adjacency = mechanism.adjacency.replace("_", "/")
        return f"{self.epsilon:g} ({mechanism.unit}-level, {adjacency} adjacency, delta={self.delta:g})"


def _limit_of_job(job: str, budget: float, delta: float) -> Limit:
    if "/" not in job:
        return Limit(f"job {job!r} at hospital", budget, delta, MORE_NOISE)
    subject = f"job {job!r}, with the other baselines and studies of its run, at hospital"
    return Limit(subject, budget, delta, "Raise privacy.extra_epsilon, or ask for fewer baselines and studies.")


def _refuse_more(account: Account, limit: Limit, segments: Sequence[Charge], mechanism: Mechanism) -> None:
    after = epsilon_spent(segments, limit.delta)
    if after > limit.epsilon:
        raise BudgetExceeded(
            f"{limit.subject} {account[0]!r} would reach epsilon={_rounded_up(after)} on data set {account[1]!r}; its "
            f"budget is {limit.terms_with(mechanism)}. {limit.advice}"
        )


def _unprotected(account: Account, limit: Limit, mechanism: Mechanism) -> BudgetExceeded:
    return BudgetExceeded(
        f"the account is unprotected: data set {account[1]!r} of hospital {account[0]!r} was used without "
        f"patient-level differential privacy, and its epsilon is infinite; the budget of {limit.subject} "
        f"{account[0]!r} is {limit.terms_with(mechanism)}. Only the "
        "hospital's own policy can allow more: privacy.allow_unprotected."
    )


def _refuse_other_unit(
    terms: AccountTerms, account: Account, rows: Sequence[LedgerEvent], mechanism: Mechanism
) -> None:
    if mechanism.unit == "patient" and mechanism.adjacency == "zero_out":
        raise LedgerError(
            "patients are charged under add/remove adjacency; zero-out is that of a tree over whole hospitals"
        )
    if mechanism.unit != terms.unit or (charges(rows) and labels_of(rows)["unit"] != mechanism.unit):
        raise LedgerError(
            f"the ledger of {account[0]!r}, data set {account[1]!r}, holds charges of another unit than "
            f"{mechanism.unit}; epsilons of patients and hospitals do not add up. Use another state folder"
        )


def _refuse_twice(rows: Sequence[LedgerEvent], wanted: ChargeRequest) -> None:
    for row in charges(rows):
        if (row.job, row.round, row.attempt) == (wanted.job, wanted.round, wanted.attempt):
            raise LedgerError(
                f"job {wanted.job!r}, round {wanted.round}, attempt {wanted.attempt} is charged already (row "
                f"{row.sequence}); a retry trains on other noise and is a new charge: use the next attempt number"
            )


def _refuse_second_run(terms: AccountTerms, account: Account, rows: Sequence[LedgerEvent], job: str) -> None:
    first = next(iter(charges(rows)), None)
    if terms.one_run and first is not None and run_of(first.job or "") != run_of(job):
        raise BudgetExceeded(
            f"hospital {account[0]!r} has private data and nobody has declared a budget for data set {account[1]!r}, "
            f"on which run {run_of(first.job or '')!r} has spent already. Declare max_epsilon in the site policy, so "
            "that the hospital decides how much may be spent in all."
        )


def _refuse_more_steps(terms: AccountTerms, account: Account, rows: Sequence[LedgerEvent], num_steps: int) -> None:
    total = num_steps + sum(row.num_steps or 0 for row in charges(rows))
    if terms.max_steps is not None and total > terms.max_steps:
        raise BudgetExceeded(
            f"hospital {account[0]!r} allows {terms.max_steps} private steps on data set {account[1]!r} in all; this "
            f"round would make them {total}. Lower federation.rounds or steps."
        )


def _rounded_up(epsilon: float) -> str:
    """Print an epsilon rounded up, so that it never reads as within the budget it exceeds."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "infinity"
