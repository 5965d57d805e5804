"""One round, top to bottom: plan, reserve, train, judge, aggregate, keep, report.

Read `run_round` first; each step below it is one function. Whatever a hospital does, the round ends
with a receipt that names everybody who was asked and what became of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from medfl_ray import params
from medfl_ray.aggregation.fixed_point import PartialSum, add_update, empty_sum, merge_sums, weighted_mean
from medfl_ray.aggregation.strategies import Strategy, released_weights
from medfl_ray.config import RunConfig
from medfl_ray.errors import UpdateRejected
from medfl_ray.failpoints import failpoint
from medfl_ray.federation.events import Event, HospitalState
from medfl_ray.federation.hospital_level import CLIP_NORM, FEDERATION, HospitalLevel
from medfl_ray.federation.policies import Decision, judge_round
from medfl_ray.federation.ports import (
    ClientPool,
    FederationState,
    LedgerKeeper,
    RunKeeper,
    SignatureCheck,
    SummedUpdates,
    TrainedHospital,
)
from medfl_ray.federation.screening import Expected, why_rejected
from medfl_ray.federation.signatures import update_digest
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    LedgerRows,
    Mechanism,
    Metric,
    PrivacySpent,
    Receipt,
    RoundPlan,
    RoundResult,
    SiteEvaluation,
)
from medfl_ray.training.schedules import learning_rate


@dataclass(frozen=True)
class RoundContext:
    """What stays the same over the rounds of a run; `central` is there under hospital-level differential privacy.

    `weight` is each hospital's public aggregation weight, `keys` the public key of each that signs its updates.
    `evaluated` are the hospitals that are asked to score the weights, and `select` names who trains in a round.
    """

    run: RunConfig
    job: str
    attempt: int
    layout: params.Layout
    strategy: Strategy
    pool: ClientPool
    keeper: RunKeeper
    mirror: LedgerKeeper
    available: tuple[str, ...]
    num_steps: Mapping[str, int]
    weight: Mapping[str, int]
    mechanisms: Mapping[str, Mechanism]
    keys: Mapping[str, str]
    is_signed: SignatureCheck
    emit: Callable[[Event], None]
    evaluated: tuple[str, ...]
    select: Callable[[int], tuple[str, ...]]
    central: HospitalLevel | None = None

    @property
    def secret_cohorts(self) -> bool:
        """Whether nobody but the coordinator may learn who was asked."""
        return self.central is not None and self.central.secret_cohorts


@dataclass
class Tally:
    """What has happened in the round so far."""

    spent: dict[str, PrivacySpent] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    update_hashes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)
    ledger_rows: list[LedgerRows] = field(default_factory=list)


def run_round(
    context: RoundContext, state: FederationState, failed_before: int
) -> tuple[FederationState, RoundResult, Decision]:
    """Run one round and return the next state, what happened, and whether the run may go on."""
    started, tally = time.monotonic(), Tally()
    plan = plan_round(context, state)
    context.keeper.open_round(shown_plan(context, plan))
    failpoint("round.opened")

    ready = reserve(context, plan, tally)
    failpoint("round.reserved")
    decision = judge(context, plan, len(ready), failed_before)
    if decision.verdict == "publish":
        context.keeper.start_collecting(plan)
        failpoint("round.collecting")
        total = collect_updates(context, plan, ready, state, tally)
        failpoint("round.collected")
        mirror_rows(context, plan, tally)
        failpoint("round.mirrored")
        decision = judge(context, plan, total.num_updates, failed_before)
    else:
        context.pool.release(plan, ready, "the round ended before training: below quorum")

    if decision.verdict != "publish":
        result = close_round(context, plan, tally, None, started, decision.reason)
        context.keeper.record(result)
        return state, result, decision

    published = apply_updates(context, state, total, tally)
    weights_after = params.checksum(published.weights)
    context.keeper.note_aggregated(plan, weights_after)
    failpoint("round.aggregated")
    if is_evaluated(context.run, plan.round):
        evaluate_weights(context, plan.round, published, tally)
        failpoint("round.evaluated")
    result = close_round(context, plan, tally, weights_after, started)
    context.keeper.save_checkpoint(published, result)
    failpoint("round.published")
    context.keeper.record(result)
    failpoint("round.recorded")
    return published, result, decision


def plan_round(context: RoundContext, state: FederationState) -> RoundPlan:
    """Fix who is asked and what each will do, before any hospital trains."""
    run, number = context.run, state.round + 1
    if context.central is not None:
        hospitals = context.central.cohort(context.available, number)
    else:
        hospitals = context.select(number)
    return RoundPlan(
        job=context.job,
        round=number,
        attempt=context.attempt,
        config_hash=run.config_hash,
        weights_checksum=params.checksum(state.weights),
        hospitals=hospitals,
        num_steps={hospital: context.num_steps[hospital] for hospital in hospitals},
        learning_rate=learning_rate(run.training, number, run.federation.rounds),
        mechanisms={h: context.mechanisms[h] for h in hospitals if h in context.mechanisms},
        deadline_s=run.federation.deadline_s,
        clip_norm=context.central.clip_norm if context.central is not None else None,
        ledger_heads=context.mirror.heads([h for h in hospitals if h in context.mechanisms]),
    )


def reserve(context: RoundContext, plan: RoundPlan, tally: Tally) -> list[str]:
    """Reserve the round's worst case at every hospital; who cannot afford it is left out, and that is recorded.

    The coordinator has mirrored every reservation before this returns, so that none can be forgotten unseen.
    """
    if context.central is not None:
        tally.spent[FEDERATION] = context.central.reserve(plan)
    ready = []
    for hospital, answer in context.pool.reserve(plan).items():
        if isinstance(answer, ClientFailure):
            leave_out(context, tally, answer)
            continue
        if answer is not None:
            tally.spent[hospital] = take_rows(answer, tally)
        ready.append(hospital)
    refused = mirror_rows(context, plan, tally)
    if refused:
        context.pool.release(plan, [h for h in ready if h in refused], "the coordinator could not mirror the ledger")
    return [hospital for hospital in ready if hospital not in refused]


def judge(context: RoundContext, plan: RoundPlan, num_updates: int, failed_before: int) -> Decision:
    """Judge the round; under hospital-level DP it is published whatever arrived, for giving up would tell of it."""
    if context.central is not None:
        return Decision("publish", "whatever arrived is noised and published")
    return judge_round(context.run.federation, num_updates, len(plan.hospitals), failed_before)


def leave_out(context: RoundContext, tally: Tally, failure: ClientFailure) -> None:
    """Record why a hospital does not train in this round."""
    tally.failures.append(failure)
    tell(context, HospitalState(hospital=failure.hospital, state="left_out", detail=failure.reason))


def tell(context: RoundContext, state: HospitalState) -> None:
    """Say what a hospital of the cohort is doing, unless the cohort is secret."""
    if not context.secret_cohorts:
        context.emit(state)


def take_rows(spent: PrivacySpent, tally: Tally) -> PrivacySpent:
    """Take the ledger's new rows off an answer, so that the mirror alone keeps them."""
    tally.ledger_rows.extend(spent.ledger_rows)
    return spent.model_copy(update={"ledger_rows": ()})


def mirror_rows(context: RoundContext, plan: RoundPlan, tally: Tally) -> set[str]:
    """Keep the new rows of all ledgers in one write; return the hospitals whose rows do not follow those kept."""
    problems = context.mirror.keep(tally.ledger_rows)
    tally.ledger_rows.clear()
    for hospital, reason in problems.items():
        leave_out(
            context,
            tally,
            ClientFailure(hospital=hospital, round=plan.round, attempt=plan.attempt, stage="reserve", reason=reason),
        )
    return set(problems)


def collect_updates(
    context: RoundContext, plan: RoundPlan, ready: Sequence[str], state: FederationState, tally: Tally
) -> PartialSum:
    """Sum the updates as they arrive; one that does not fit is refused with a reason and the round goes on."""
    total, expected = empty_sum(context.layout.size), expected_updates(context, plan, state)
    for hospital in ready:
        tell(context, HospitalState(hospital=hospital, state="training", num_steps=plan.num_steps[hospital]))
    for answer in context.pool.train(plan, ready, state.weights):
        reason = answer.reason if isinstance(answer, ClientFailure) else ""
        if isinstance(answer, ClientFailure):
            tally.failures.append(answer)
        else:
            try:
                if isinstance(answer, SummedUpdates):
                    total = add_sum(context, total, answer, plan, tally)
                else:
                    total = screen_and_add(context, total, answer, expected, tally)
            except UpdateRejected as error:
                reason = str(error)
                refuse(plan, answer, reason, tally)
        state_name = "failed" if reason else "done"
        for hospital in hospitals_of(answer):
            tell(context, HospitalState(hospital=hospital, state=state_name, detail=reason))
    return total


def expected_updates(context: RoundContext, plan: RoundPlan, state: FederationState) -> Expected:
    """Say what an update of the round has to fit."""
    weight = {hospital: context.weight[hospital] for hospital in plan.hospitals}
    return Expected(plan, context.layout, weight, params.norm(state.weights), may_be_zero=context.central is not None)


def hospitals_of(answer: ClientUpdate | SummedUpdates | ClientFailure) -> list[str]:
    """Return the hospitals that an answer is about."""
    return [one.hospital for one in answer.trained] if isinstance(answer, SummedUpdates) else [answer.hospital]


def refuse(plan: RoundPlan, answer: ClientUpdate | SummedUpdates, reason: str, tally: Tally) -> None:
    """Record why nothing of an answer was used, for each hospital that it is about."""
    tally.failures.extend(
        ClientFailure(hospital=hospital, round=plan.round, attempt=plan.attempt, stage="screen", reason=reason)
        for hospital in hospitals_of(answer)
    )


def screen_and_add(
    context: RoundContext, total: PartialSum, update: ClientUpdate, expected: Expected, tally: Tally
) -> PartialSum:
    """Add an update that belongs to this round and is sound; UpdateRejected says why one is not."""
    reason = why_rejected(update, expected, tally.trained)
    if reason is not None:
        raise UpdateRejected(reason)
    checksum = params.checksum(update.delta)
    key = context.keys.get(update.hospital)
    if key is not None and not context.is_signed(key, update_digest(context.job, update, checksum), update.signature):
        raise UpdateRejected("the update's signature is not the hospital's; it was altered, or somebody else sent it")
    note_trained(context, expected.plan, [update], tally)
    if context.central is not None:
        total = add_update(total, context.central.admit(update), 1)
    else:
        total = add_update(total, update.delta, update.num_patients)
    tally.update_hashes[update.hospital] = checksum
    return total


def add_sum(
    context: RoundContext, total: PartialSum, answer: SummedUpdates, plan: RoundPlan, tally: Tally
) -> PartialSum:
    """Add updates that were summed where they were trained; UpdateRejected says why a sum does not belong here."""
    hospitals = hospitals_of(answer)
    if (answer.round, answer.attempt) != (plan.round, plan.attempt):
        raise UpdateRejected(
            f"the sum is of round {answer.round}, attempt {answer.attempt}; this is round {plan.round}, "
            f"attempt {plan.attempt}"
        )
    if answer.layout_checksum != context.layout.checksum or answer.total.num_updates != len(hospitals):
        raise UpdateRejected("the sum's layout or number of updates is not what it says")
    if not set(hospitals) <= plan.num_steps.keys() - tally.trained or len(set(hospitals)) < len(hospitals):
        raise UpdateRejected("the sum holds a hospital that was not asked or has delivered already")
    note_trained(context, plan, answer.trained, tally)
    return merge_sums(total, answer.total)


def note_trained(
    context: RoundContext, plan: RoundPlan, those: Sequence[ClientUpdate | TrainedHospital], tally: Tally
) -> None:
    """Take down whose updates are in the sum, with their figures and what they have spent."""
    if not context.secret_cohorts:
        context.keeper.note_delivered(plan, [one.hospital for one in those])
    failpoint("round.update")
    for one in those:
        tally.trained.add(one.hospital)
        tally.metrics[one.hospital] = dict(one.metrics)
        if one.spent is not None:
            tally.spent[one.hospital] = take_rows(one.spent, tally)


def apply_updates(context: RoundContext, state: FederationState, total: PartialSum, tally: Tally) -> FederationState:
    """Let the strategy turn the mean update into the next weights; under hospital-level DP the noised one."""
    if context.central is None:
        server_state, weights = context.strategy.apply(state.server_state, state.weights, weighted_mean(total))
        return FederationState(state.round + 1, weights, server_state)
    tally.spent[FEDERATION] = context.central.settle()
    own_state = {name: value for name, value in state.server_state.items() if name != CLIP_NORM}
    server_state, weights = context.strategy.apply(own_state, state.weights, context.central.release(total))
    return FederationState(state.round + 1, weights, {**server_state, **context.central.server_state()})


def is_evaluated(run: RunConfig, number: int) -> bool:
    """Evaluate every `eval_every` rounds and always after the last."""
    return number % run.federation.eval_every == 0 or number == run.federation.rounds


def evaluate_weights(context: RoundContext, number: int, state: FederationState, tally: Tally) -> None:
    """Score the new weights at every hospital; a hospital that cannot is recorded, and the round stands."""
    weights = released_weights(state.server_state, state.weights)
    for answer in context.pool.evaluate(number, context.evaluated, weights, pictures=False):
        if isinstance(answer, SiteEvaluation):
            tally.metrics.setdefault(answer.hospital, {}).update(answer.metrics)
        else:
            tally.failures.append(answer)


def close_round(
    context: RoundContext, plan: RoundPlan, tally: Tally, weights_after: str | None, started: float, reason: str = ""
) -> RoundResult:
    """Write the receipt: who was asked, who trained, who did not and why; `reason` where nothing is published."""
    plan = shown_plan(context, plan)
    if context.secret_cohorts:
        tally = without_cohort(tally)
    # Under hospital-level DP an update is not noised before it is summed, and its hash would confirm a guess of it.
    hashes = {} if context.central is not None else tally.update_hashes
    receipt = Receipt(
        job=plan.job,
        round=plan.round,
        attempt=plan.attempt,
        plan_hash=plan.digest,
        config_hash=plan.config_hash,
        asked=plan.hospitals,
        trained=tuple(sorted(tally.trained)),
        failures=tuple(sorted(tally.failures, key=lambda failure: failure.hospital)),
        update_hashes=dict(sorted(hashes.items())),
        spent=dict(sorted(tally.spent.items())),
        weights_before=plan.weights_checksum,
        weights_after=weights_after,
        published=weights_after is not None,
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        secret_cohort=context.secret_cohorts,
        reason=reason,
    )
    duration_s = 0.0 if context.secret_cohorts else round(time.monotonic() - started, 3)
    return RoundResult(round=plan.round, receipt=receipt, metrics=tally.metrics, duration_s=duration_s)


def shown_plan(context: RoundContext, plan: RoundPlan) -> RoundPlan:
    """Return the plan as it may be written down: without the names of a cohort that is secret."""
    if not context.secret_cohorts:
        return plan
    return plan.model_copy(update={"hospitals": (), "num_steps": {}, "ledger_heads": {}})


def without_cohort(tally: Tally) -> Tally:
    """Leave out what would tell who was asked; the evaluation asks everybody, so that its failures stay."""
    failures = [failure for failure in tally.failures if failure.stage == "evaluate"]
    evaluated = {hospital: metrics for hospital, metrics in sorted(tally.metrics.items()) if metrics}
    return Tally(spent=tally.spent, failures=failures, metrics=evaluated)
