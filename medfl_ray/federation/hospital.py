"""One hospital: its data, its trainer and its ledger, behind the five things a round asks of it.

Nothing here raises to the caller. What goes wrong becomes a `ClientFailure` with a reason; the details
of an unexpected error go to the hospital's own log, because its text might hold an identifier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from medfl_ray import params
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError, PrivacyError
from medfl_ray.federation.hospital_rules.agreement import Agreement
from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes, answer_step_s
from medfl_ray.federation.hospital_rules.labels import labelled
from medfl_ray.federation.hospital_rules.private_answers import (
    ScoringRecord,
    is_confidential,
    is_suppressed,
    shown_reason,
)
from medfl_ray.federation.hospital_rules.site_evaluation import score_site, suppressed_scores
from medfl_ray.federation.planning import aggregation_weight
from medfl_ray.federation.ports import AlonePlan, AloneResult, Ledger, Memory, Signer
from medfl_ray.federation.signatures import update_digest
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    FailureStage,
    HospitalInfo,
    Mechanism,
    Metric,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
)
from medfl_ray.params import Vector
from medfl_ray.privacy.hospital_level import clip_update
from medfl_ray.training.scoring.evaluation import PatientScore

if TYPE_CHECKING:  # the driver of a simulation, which names this room, must not spend its time and memory on torch
    from medfl_ray.data.prepare.dataset import HospitalData
    from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome
    from medfl_ray.training.rules.passes import LocalRules
    from medfl_ray.training.trainer import Trainer

log = structlog.get_logger()
T = TypeVar("T")
PictureMaker = Callable[["Trainer", Vector, "HospitalData"], tuple[bytes, ...]]
LocalReporter = Callable[[int, Mapping[str, float], list[PatientScore], tuple[bytes, ...]], None]


@dataclass(frozen=True)
class HospitalParts:
    """What a hospital is built from; see medfl_ray/assembly/hospital.py for the composition.

    `memory` is there where the strategy has hospitals remember something. `reservations` are those that are open; where
    each request has a process of its own, they lie in a file. `agreement` is what the hospital takes part in; `scored`
    is there where scores of private patients are kept for the hospital's own report.
    """

    run: RunConfig
    policy: SitePolicy
    index: int
    trainer: Trainer
    rules: LocalRules
    data: HospitalData
    ledger: Ledger | None
    make_pictures: PictureMaker
    write_local_report: LocalReporter
    signer: Signer | None = None
    memory: Memory | None = None
    reservations: MutableMapping[tuple[str, int, int], tuple[str, Mechanism]] = field(default_factory=dict)
    agreement: Agreement | None = None
    times: AnswerTimes = field(default_factory=AnswerTimes)
    scored: ScoringRecord | None = None


class Hospital:
    """A hospital that takes part in one run."""

    def __init__(self, parts: HospitalParts) -> None:
        self._parts = parts
        self._reservations = parts.reservations
        self._agreement = parts.agreement or Agreement(parts.run, parts.policy)

    @property
    def id(self) -> str:
        """Name of the hospital."""
        return self._parts.policy.hospital

    def info(self) -> HospitalInfo | ClientFailure:
        """Say what is public about this hospital, or why it takes no part in the run."""

        def work() -> HospitalInfo:
            parts = self._parts
            if not parts.run.privacy.patient_level:
                self._check_unprotected()
                # Now and not when it is first asked: it may score without training, and with a secret cohort the time
                # of the row would tell that it was drawn.
                self._mark_unprotected(self._agreement.job)
            return HospitalInfo(
                hospital=self.id,
                declared=parts.policy.declared,
                data_set=parts.policy.data_set,
                num_patients=parts.policy.num_patients,
                num_channels=len(parts.data.channels),
                labels=dict(parts.data.labels),
                layout_checksum=parts.trainer.layout.checksum,
                device=str(parts.trainer.device),
                patient_group_size=parts.trainer.group_size() if parts.run.privacy.patient_level else None,
                public_key=parts.signer.public_key if parts.signer is not None else None,
                spent=self._described_spent(),
            )

        answer = self._guarded(0, 0, "start", False, work)
        return answer.model_copy(update={"config_fault": True}) if isinstance(answer, ClientFailure) else answer

    def reserve(self, plan: RoundPlan) -> PrivacySpent | ClientFailure | None:
        """Charge the plan's worst case in this hospital's ledger, or say why it cannot take part.

        What an earlier attempt at the round has left in the hospital's memory is void.
        """
        memory = self._parts.memory
        if memory is not None:
            forget = partial(memory.forget_from, plan.round)
            failure = self._guarded(plan.round, plan.attempt, "reserve", False, forget)
            if failure is not None:
                return failure
        return self._reserve(plan)

    def _reserve(self, plan: RoundPlan) -> PrivacySpent | ClientFailure | None:

        def work() -> PrivacySpent | None:
            mechanism = self._agreed_mechanism(plan)
            ledger = self._parts.ledger
            if ledger is None:
                return None
            ledger.check_heads(plan.ledger_heads)
            if mechanism is None:
                # Written, and with a plain plan mirrored, before anything leaves.
                self._mark_unprotected(plan.job)
                return self._with_rows(ledger.spent(), plan) if plan.clip_norm is None else None
            key = (plan.job, plan.round, plan.attempt)
            budget = self._agreement.budget_of(plan.job)
            self._reservations[key] = ledger.reserve(*key, mechanism, budget), mechanism
            return self._with_rows(ledger.spent(), plan)

        return self._guarded(plan.round, plan.attempt, "reserve", False, work)

    def release(self, plan: RoundPlan, reason: str) -> None:
        """Give back a reservation under which no training was started; where that fails, it stays charged."""

        def work() -> None:
            reserved = self._reservations.pop((plan.job, plan.round, plan.attempt), None)
            if reserved is not None and self._parts.ledger is not None:
                self._parts.ledger.release(reserved[0], reason)

        failure = self._guarded(plan.round, plan.attempt, "reserve", False, work)
        if failure is not None:
            log.error("release_failed", hospital=self.id, round=plan.round, reason=failure.reason)

    def train(self, plan: RoundPlan, weights: Vector) -> ClientUpdate | ClientFailure:
        """Train on this hospital's patients; the cost is settled before the update is returned.

        Args:
          weights: the round's weights [P], and behind them what else the strategy sends.
        """
        answer = self._train(plan, weights, self._train_by_rule)
        if isinstance(answer, ClientFailure):
            return answer
        # Who took part in a secret cohort shows in no row that is sent.
        sent = answer.spent if plan.clip_norm is None else None
        spent = self._with_rows(sent, plan) if sent is not None else None
        return self._signed(replace(answer, spent=spent), plan.job)

    def _signed(self, update: ClientUpdate, job: str) -> ClientUpdate:
        signer = self._parts.signer
        if signer is None:
            return update
        return replace(update, signature=signer.sign(update_digest(job, update, params.checksum(update.delta))))

    def _train_by_rule(self, plan: RoundPlan, sent: Vector, job: LocalJob) -> LocalOutcome:
        """Do the hospital's side of the strategy, from what it remembers, and remember what comes of it."""
        parts = self._parts
        known = parts.memory.before(plan.round) if parts.memory is not None else {}
        done = parts.rules.train(sent, known, parts.data, job, parts.index)
        if parts.memory is not None:
            parts.memory.save(plan.round, done.memory)
        return done.outcome

    def _train_plainly(self, plan: RoundPlan, weights: Vector, job: LocalJob) -> LocalOutcome:
        return self._parts.trainer.train(weights, self._parts.data, job)

    def _train(
        self, plan: RoundPlan, weights: Vector, train: Callable[[RoundPlan, Vector, LocalJob], LocalOutcome]
    ) -> ClientUpdate | ClientFailure:

        def work() -> ClientUpdate:
            started = time.monotonic()
            parts = self._parts
            outcome = train(plan, weights, self._claim(plan))
            losses = {"train_loss": outcome.mean_loss} if plan.clip_norm is None else {}
            delta, within = outcome.delta, None
            if plan.clip_norm is not None:
                delta, within = clip_update(delta, plan.clip_norm)
            return ClientUpdate(
                hospital=self.id,
                round=plan.round,
                attempt=plan.attempt,
                delta=delta,
                layout_checksum=parts.trainer.layout.checksum,
                aggregation_weight=aggregation_weight(parts.run, parts.policy),
                num_steps=outcome.num_steps,
                spent=self._spent(),
                metrics=self._labelled(losses),
                duration=self._labelled({"duration_s": time.monotonic() - started})["duration_s"],
                within_clip=within,
            )

        return self._guarded(plan.round, plan.attempt, "train", True, work)

    def evaluate(self, round: int, weights: Vector, pictures: bool = False) -> SiteEvaluation | ClientFailure:
        """Score weights on the held-out patients; per-patient figures and pictures only of data that may be shown.

        Where the strategy gives the hospital a model of its own, that is what is scored; the shared one's headline
        stands beside it. In round 0 nothing is remembered, and the weights are scored as they are. Where the figures
        are suppressed, the answer does not depend on the patients, nor on whether they could be scored.
        """
        if self._suppresses_scores():
            return suppressed_scores(self._parts, round, weights, pictures, self._score)

        def work() -> SiteEvaluation:
            self._mark_unprotected(self._agreement.job)
            return self._score(round, weights, pictures)

        return self._guarded(round, 0, "evaluate", False, work)

    def _suppresses_scores(self) -> bool:
        """Whether scores stay here: by the run's privacy, or because this hospital shows nothing unprotected."""
        parts = self._parts
        if is_suppressed(parts.run, parts.policy):
            return True
        try:
            self._check_unprotected()
        except PrivacyError:
            return is_confidential(parts.policy)
        return False

    def _score(self, round: int, weights: Vector, pictures: bool) -> SiteEvaluation:
        return score_site(self._parts, round, weights, pictures)

    def train_alone(self, plan: AlonePlan, weights: Vector) -> AloneResult | ClientFailure:
        """Run a baseline here: every round reserved and charged like a round of the federation.

        The run's extra epsilon and the lifetime budget of the data set bind it; the run's own epsilon does not.
        """
        parts = self._parts
        if not is_confidential(parts.policy):
            return self._train_alone(plan, weights)
        # Of the run's rounds, not of those that are asked for: who asks must not choose the step.
        with parts.times.padded("alone", answer_step_s(parts.policy, parts.run.federation.rounds)):
            return self._train_alone(plan, weights)

    def _train_alone(self, plan: AlonePlan, weights: Vector) -> AloneResult | ClientFailure:
        refused = self._guarded(0, 0, "reserve", False, partial(self._agreement.check_baseline, plan.rounds))
        if refused is not None:
            return refused
        current, curve = weights, {}
        for round_plan in plan.rounds:
            reserved = self._reserve(round_plan)
            if isinstance(reserved, ClientFailure):
                return reserved
            answer = self._train(round_plan, current, self._train_plainly)
            if isinstance(answer, ClientFailure):
                return answer
            current = current + answer.delta
            if plan.evaluates and round_plan is not plan.rounds[-1]:
                between = self.evaluate(0, current)
                if isinstance(between, SiteEvaluation):
                    curve[round_plan.round] = between.metrics
        last = len(plan.rounds)
        evaluation = self.evaluate(0, current)
        if isinstance(evaluation, ClientFailure):
            return evaluation
        spent = self._spent()
        if spent is not None:
            spent = self._with_rows(spent, plan.rounds[0])
        curve[last] = evaluation.metrics
        kept = current if plan.returns_weights else None
        return AloneResult(self.id, evaluation.metrics, spent, kept, evaluation.patient_scores, curve)

    def check_expected(self, heads: Iterable[str]) -> None:
        """Refuse to go on where the account lacks a row that the coordinator has seen.

        Raises:
          LedgerError: it lacks one.
        """
        ledger = self._parts.ledger
        if ledger is None:
            return
        for head in heads:
            ledger.check_heads({self.id: head})

    def export_ledger(self) -> dict[str, Any]:
        """Return the account's events, or nothing where DP is off."""
        return self._parts.ledger.export() if self._parts.ledger is not None else {}

    def close(self) -> None:
        """Leave nothing of the images on the disk."""
        self._parts.data.close()

    def _with_rows(self, spent: PrivacySpent, plan: RoundPlan) -> PrivacySpent:
        """Add the ledger's rows that the coordinator has not seen, for its mirror."""
        ledger = self._parts.ledger
        rows = ledger.rows_after(plan.ledger_heads) if ledger is not None else ()
        return spent.model_copy(update={"ledger_rows": rows})

    def _spent(self) -> PrivacySpent | None:
        return self._parts.ledger.spent() if self._parts.ledger is not None else None

    def _described_spent(self) -> PrivacySpent | None:
        """Return what the account holds at the start; without patient-level privacy with its rows, for the mirror.

        What leaves then is charged in no round, and a plan of a secret cohort asks for no rows.
        """
        ledger = self._parts.ledger
        if ledger is None:
            return None
        rows = ledger.rows_after({}) if not self._parts.run.privacy.patient_level else ()
        return ledger.spent().model_copy(update={"ledger_rows": rows})

    def _agreed_mechanism(self, plan: RoundPlan) -> Mechanism | None:
        self._agreement.check_plan(plan)
        mechanism = self._agreement.check_mechanism(plan)
        if mechanism is None:
            self._check_unprotected()
        return mechanism

    def _check_unprotected(self) -> None:
        ledger = self._parts.ledger
        self._agreement.check_unprotected(ledger is not None and ledger.has_charges())

    def _mark_unprotected(self, job: str) -> None:
        """Write down that something of private data leaves without patient-level differential privacy."""
        if is_confidential(self._parts.policy) and self._parts.ledger is not None:
            unit = "hospital-level" if self._parts.run.privacy.hospital_dp else "no"
            reason = f"trained and shown with {unit} differential privacy: no patient-level epsilon bounds it"
            self._parts.ledger.mark_unprotected(job.partition("/")[0], reason)

    def _claim(self, plan: RoundPlan) -> LocalJob:
        """Settle the reservation and hand out the job; settled first, so that no crash in training can undercount."""
        from medfl_ray.training.rules.local_job import LocalJob

        mechanism = self._agreed_mechanism(plan)
        if mechanism is not None:
            reservation, charged = self._reservations.pop((plan.job, plan.round, plan.attempt), (None, None))
            if reservation is None or self._parts.ledger is None:
                raise PrivacyConfigError(
                    f"round {plan.round}, attempt {plan.attempt} holds no reservation in this hospital's ledger; "
                    "training without one never happens"
                )
            if mechanism != charged:
                raise PrivacyConfigError(
                    f"the mechanism of round {plan.round}, attempt {plan.attempt} is not the one that was reserved; "
                    "what was charged and nothing else is trained"
                )
            self._parts.ledger.settle(reservation, mechanism=mechanism)
        elif is_confidential(self._parts.policy):
            self._mark_unprotected(plan.job)
        seed_key = (abs(self._parts.run.federation.seed), plan.round, self._parts.index)
        return LocalJob(plan.num_steps[self.id], plan.learning_rate, mechanism, seed_key)

    def _guarded(
        self, round: int, attempt: int, stage: FailureStage, may_have_left: bool, work: Callable[[], T]
    ) -> T | ClientFailure:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - whatever it is passes the gate
            reason = shown_reason(self._parts.policy, error, stage, round)
        return ClientFailure(
            hospital=self.id, round=round, attempt=attempt, stage=stage, reason=reason, may_have_left=may_have_left
        )

    def _labelled(self, values: Mapping[str, float]) -> dict[str, Metric]:
        return labelled(values, self._parts.policy.declared, self._parts.run.privacy.enable_dp)
