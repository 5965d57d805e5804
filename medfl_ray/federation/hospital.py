"""One hospital: its data, its trainer and its ledger, behind the five things a round asks of it.

Nothing here raises to the caller. What goes wrong becomes a `ClientFailure` with a reason; the details
of an unexpected error go to the hospital's own log, because its text might hold an identifier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from medfl_ray import params
from medfl_ray.config import RunConfig
from medfl_ray.errors import DataError, MedflError, PrivacyConfigError
from medfl_ray.federation.labels import labelled
from medfl_ray.federation.planning import aggregation_weight, budget_of, check_limits, check_terms
from medfl_ray.federation.ports import AlonePlan, AloneResult, Ledger, Memory, Signer
from medfl_ray.federation.signatures import update_digest
from medfl_ray.federation.site_evaluation import figures_of, score_patients, site_evaluation
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    HospitalInfo,
    Mechanism,
    Metric,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
    Stage,
)
from medfl_ray.params import Vector
from medfl_ray.privacy.hospital_level import clip_update
from medfl_ray.site_policy import SitePolicy
from medfl_ray.training.evaluation import PatientScore

if TYPE_CHECKING:  # the driver of a simulation, which names this room, must not spend its time and memory on torch
    from medfl_ray.data.dataset import HospitalData
    from medfl_ray.training.local_job import LocalJob, LocalOutcome
    from medfl_ray.training.local_passes import LocalRules
    from medfl_ray.training.trainer import Trainer

log = structlog.get_logger()
Answer = TypeVar("Answer")
PictureMaker = Callable[["Trainer", Vector, "HospitalData"], tuple[bytes, ...]]
LocalReporter = Callable[[int, Mapping[str, float], list[PatientScore], tuple[bytes, ...]], None]


@dataclass(frozen=True)
class HospitalParts:
    """What a hospital is built from; see actors/hospital.py for the composition.

    `memory` is there where the strategy has hospitals remember something. `reservations` are those that are open; where
    each request has a process of its own, they lie in a file.
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


class Hospital:
    """A hospital that takes part in one run."""

    def __init__(self, parts: HospitalParts) -> None:
        self._parts = parts
        self._reservations = parts.reservations

    @property
    def id(self) -> str:
        """Name of the hospital."""
        return self._parts.policy.hospital

    def info(self) -> HospitalInfo:
        """Say what is public about this hospital."""
        parts = self._parts
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
            spent=self._spent(),
        )

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
        return self._reserve(plan, self._parts.run.privacy.epsilon)

    def _reserve(self, plan: RoundPlan, run_budget: float | None) -> PrivacySpent | ClientFailure | None:

        def work() -> PrivacySpent | None:
            mechanism = self._agreed_mechanism(plan)
            ledger = self._parts.ledger
            if mechanism is None or ledger is None:
                return None
            ledger.check_heads(plan.ledger_heads)
            key = (plan.job, plan.round, plan.attempt)
            self._reservations[key] = ledger.reserve(*key, mechanism, run_budget), mechanism
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
        spent = self._with_rows(answer.spent, plan) if answer.spent is not None else None
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
                num_patients=aggregation_weight(parts.run, parts.policy),
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
        stands beside it. In round 0 nothing is remembered, and the weights are scored as they are.
        """

        def work() -> SiteEvaluation:
            parts, run, policy = self._parts, self._parts.run, self._parts.policy
            own = self._own(round, weights)
            scores, bins = score_patients(parts.trainer, own, parts.data, run, is_last=pictures)
            shared = self._shared_scores(round, own, weights, scores)
            values = figures_of(run, policy, parts.data.labels, scores, is_last=pictures, shared=shared)
            drawn = parts.make_pictures(parts.trainer, own, parts.data) if pictures else ()
            if policy.declared == "private" and pictures:
                parts.write_local_report(round, values, scores, drawn)
            return site_evaluation(run, policy, round, values, scores, bins, drawn, is_last=pictures)

        return self._guarded(round, 0, "evaluate", False, work)

    def _own(self, round: int, weights: Vector) -> Vector:
        """Return what this hospital would use of the weights after a round."""
        parts = self._parts
        return weights if parts.memory is None else parts.rules.evaluated(parts.memory.before(round + 1), weights)

    def _shared_scores(
        self, round: int, own: Vector, weights: Vector, scores: list[PatientScore]
    ) -> list[PatientScore] | None:
        """Score the shared model too where the hospital has one of its own; None where it has none."""
        if not round or not self._parts.run.aggregation.is_personal:
            return None
        return scores if own is weights else self._parts.trainer.evaluate(weights, self._parts.data)

    def train_alone(self, plan: AlonePlan, weights: Vector) -> AloneResult | ClientFailure:
        """Run a baseline here: every round reserved and charged like a round of the federation.

        The lifetime budget of the data set binds it; the run's epsilon does not, for the central baseline
        takes more steps than a hospital does in the run and reports an epsilon of its own.
        """
        current, curve = weights, {}
        for round_plan in plan.rounds:
            reserved = self._reserve(round_plan, None)
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

    def export_ledger(self) -> dict[str, Any]:
        """Return the account's events, or nothing where DP is off."""
        return self._parts.ledger.export() if self._parts.ledger is not None else {}

    def _with_rows(self, spent: PrivacySpent, plan: RoundPlan) -> PrivacySpent:
        """Add the ledger's rows that the coordinator has not seen, for its mirror."""
        ledger = self._parts.ledger
        rows = ledger.rows_after(plan.ledger_heads) if ledger is not None else ()
        return spent.model_copy(update={"ledger_rows": rows})

    def _spent(self) -> PrivacySpent | None:
        ledger = self._parts.ledger
        if ledger is None:
            return None
        return ledger.spent().model_copy(update={"budget": self._shown_budget()})

    def _shown_budget(self) -> float | None:
        lifetime = budget_of(self._parts.run, self._parts.policy)
        return lifetime if lifetime is not None else self._parts.run.privacy.epsilon

    def _agreed_mechanism(self, plan: RoundPlan) -> Mechanism | None:
        mechanism = plan.mechanisms.get(self.id)
        policy = self._parts.policy
        if self._parts.run.privacy.central and plan.clip_norm is None:
            raise PrivacyConfigError(f"the plan of round {plan.round} has no clip norm, which privacy.unit asks for")
        if mechanism is None and (policy.require_dp or self._parts.run.privacy.patient_level):
            raise PrivacyConfigError(f"the plan of round {plan.round} has no privacy mechanism for {self.id!r}")
        if mechanism is not None and mechanism.num_patients != policy.num_patients:
            raise PrivacyConfigError(
                f"the plan assumes {mechanism.num_patients} patients at {self.id!r}; "
                f"its policy declares {policy.num_patients}"
            )
        if mechanism is not None and mechanism.num_steps != plan.num_steps[self.id]:
            raise PrivacyConfigError(
                f"the plan asks {self.id!r} for {plan.num_steps[self.id]} steps and its mechanism charges "
                f"{mechanism.num_steps}; every step that is trained must be charged"
            )
        if mechanism is not None:
            check_terms(self._parts.run, policy, mechanism)
        check_limits(policy, self._parts.run.data.task, plan.num_steps[self.id], mechanism)
        return mechanism

    def _claim(self, plan: RoundPlan) -> LocalJob:
        """Settle the reservation and hand out the job; settled first, so that no crash in training can undercount."""
        from medfl_ray.training.local_job import LocalJob

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
            self._parts.ledger.settle(reservation)
        seed_key = (abs(self._parts.run.federation.seed), plan.round, self._parts.index)
        return LocalJob(plan.num_steps[self.id], plan.learning_rate, mechanism, seed_key)

    def _guarded(
        self, round: int, attempt: int, stage: Stage, left_host: bool, work: Callable[[], Answer]
    ) -> Answer | ClientFailure:
        try:
            return work()
        except DataError as error:
            reason = shown_problem(self._parts.run, self._parts.policy, error, stage, round)
        except MedflError as error:
            reason = str(error)
        except Exception as error:
            log.exception("hospital_failed", hospital=self.id, stage=stage, round=round)
            reason = f"{type(error).__name__} in the hospital's process; its own log has the details"
        return ClientFailure(
            hospital=self.id, round=round, attempt=attempt, stage=stage, reason=reason, left_host=left_host
        )

    def _labelled(self, values: Mapping[str, float]) -> dict[str, Metric]:
        return labelled(values, self._parts.policy.declared, self._parts.run.privacy.enable_dp)


def is_confidential(run: RunConfig, policy: SitePolicy) -> bool:
    """Whether only what the ledger has paid for may leave: private data of a run with DP."""
    return policy.declared == "private" and run.privacy.enable_dp


def shown_problem(run: RunConfig, policy: SitePolicy, error: DataError, stage: Stage, round: int = 0) -> str:
    """Return a problem of the data in the words that may leave: under DP, of private data, only its kind.

    Which case a step tripped over says that this patient was drawn, and how many cases there are.
    """
    if not is_confidential(run, policy):
        return str(error)
    log.error("hospital_data_problem", hospital=policy.hospital, stage=stage, round=round, problem=str(error))
    return (
        f"{type(error).__name__} in this hospital's private data; the case is in the hospital's own log. "
        "Run medfl-ray data inspect at the hospital"
    )
