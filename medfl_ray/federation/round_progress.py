"""What has happened in a round so far: who was left out, trained, failed or came late, and what was spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from medfl_ray.errors import LedgerError
from medfl_ray.failpoints import failpoint
from medfl_ray.federation.events import HospitalState
from medfl_ray.federation.hospital_level import FEDERATION
from medfl_ray.federation.hospital_rules.failures import in_constant_words
from medfl_ray.federation.policies import pause_before
from medfl_ray.federation.ports import TrainedHospital
from medfl_ray.federation.round_context import RoundContext
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    FailureStage,
    LedgerRows,
    Metric,
    PrivacySpent,
    RoundPlan,
)


@dataclass
class RoundProgress:
    """One round under way: its plan, and what the receipt is going to say of each hospital.

    `late` maps hospitals whose update of an earlier round is in the sum to that round. `ledger_rows` wait for the
    mirror.
    """

    context: RoundContext
    plan: RoundPlan
    spent: dict[str, PrivacySpent] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    late: dict[str, int] = field(default_factory=dict)
    update_hashes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)
    ledger_rows: list[LedgerRows] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def failure(self, hospital: str, stage: FailureStage, reason: str, may_have_left: bool = True) -> ClientFailure:
        """Return a failure of this round's attempt."""
        return ClientFailure(
            hospital=hospital,
            round=self.plan.round,
            attempt=self.plan.attempt,
            stage=stage,
            reason=reason,
            may_have_left=may_have_left,
        )

    def exclude(self, failure: ClientFailure) -> None:
        """Record why a hospital does not train in this round, and announce it."""
        self.failures.append(failure)
        self.context.tell(HospitalState(hospital=failure.hospital, state="left_out", detail=failure.reason))

    def refuse(self, hospitals: Sequence[str], reason: str) -> None:
        """Record why nothing of an answer was used, for each hospital that it is about."""
        self.failures.extend(self.failure(hospital, "screen", reason) for hospital in hospitals)

    def take_spent(self, hospital: str, spent: PrivacySpent | None) -> None:
        """Keep what a hospital has spent; its ledger's new rows are set aside for the mirror alone."""
        if spent is not None:
            self.ledger_rows.extend(spent.ledger_rows)
            self.spent[hospital] = spent.model_copy(update={"ledger_rows": ()})

    def mirror_rows(self) -> set[str]:
        """Keep the new rows of all ledgers in one write; return the hospitals whose rows do not follow those kept.

        Raises:
          LedgerError: they are those of the federation's own account.
        """
        problems = self.context.mirror.keep(self.ledger_rows)
        self.ledger_rows.clear()
        if FEDERATION in problems:
            raise LedgerError(problems[FEDERATION])
        for hospital, reason in problems.items():
            self.exclude(self.failure(hospital, "reserve", reason))
        return set(problems)

    def note_trained(self, those: Sequence[ClientUpdate | TrainedHospital]) -> None:
        """Record whose updates are in the sum, with their figures and what they have spent."""
        if not self.context.secret_cohorts:
            self.context.store.note_delivered(self.plan, [one.hospital for one in those])
        failpoint("round.update")
        for one in those:
            self.trained.add(one.hospital)
            self.metrics[one.hospital] = {} if self.context.secret_cohorts else dict(one.metrics)
            self.take_spent(one.hospital, one.spent)

    def note_late(self, update: ClientUpdate, plan: RoundPlan, checksum: str) -> None:
        """Record that an update of an earlier round, which missed that plan's deadline, is in this round's sum."""
        self.context.store.note_delivered(plan, [update.hospital])
        self.late[update.hospital] = update.round
        self.update_hashes[f"{update.hospital}, round {update.round}"] = checksum
        self.take_spent(update.hospital, update.spent)

    def wait_before_retry(self, retry: int) -> bool:
        """Wait before hospitals are asked again; return False where the retries, or the time, are used up."""
        wait_s, deadline_s = pause_before(retry), self.plan.deadline_s
        if retry > self.context.run.federation.retries:
            return False
        if deadline_s is not None and time.monotonic() - self.started + wait_s >= deadline_s:
            return False
        time.sleep(wait_s)
        return True

    def without_cohort(self) -> RoundProgress:
        """Leave out what would reveal who was asked; the evaluation asks everybody, so its failures stay."""
        return replace(
            self,
            spent={name: spent for name, spent in self.spent.items() if name == FEDERATION},
            failures=[in_constant_words(failure) for failure in self.failures if failure.stage == "evaluate"],
            trained=set(),
            late={},
            update_hashes={},
            metrics={hospital: metrics for hospital, metrics in sorted(self.metrics.items()) if metrics},
            ledger_rows=[],
        )
