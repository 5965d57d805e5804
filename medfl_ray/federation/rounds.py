"""One round, top to bottom: plan, reserve, train, judge, aggregate, evaluate, keep.

Read `run_round` first; each step below it is one function. Whatever a hospital does, the round ends
with a receipt that names everybody who was asked and what became of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from medfl_ray import params
from medfl_ray.aggregation.fixed_point import weighted_mean
from medfl_ray.aggregation.robust import why_too_few
from medfl_ray.aggregation.strategies import released_weights
from medfl_ray.aggregation.updates import ROBUST_STATE
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import budget_hash
from medfl_ray.failpoints import failpoint
from medfl_ray.federation.collecting import CollectedUpdates, UpdateCollector, expected_updates
from medfl_ray.federation.hospital_level import CLIP_NORM, FEDERATION
from medfl_ray.federation.planning import mechanism_in_round, steps_in_round
from medfl_ray.federation.policies import RoundDecision, RunHistory, hospitals_to_retry, judge_round
from medfl_ray.federation.ports import FederationState
from medfl_ray.federation.round_context import RoundContext, foreign_rows
from medfl_ray.federation.round_progress import RoundProgress
from medfl_ray.federation.selection import enough_updates
from medfl_ray.messages import ClientFailure, PrivacySpent, Receipt, RoundPlan, RoundResult, SiteEvaluation
from medfl_ray.params import Vector
from medfl_ray.round_times import clock_of, stamp
from medfl_ray.training.schedules import learning_rate


@dataclass(frozen=True, eq=False)
class RoundEnd:
    """What a round leaves: the state and the history for the next one, what happened, and whether the run goes on."""

    state: FederationState
    history: RunHistory
    result: RoundResult
    decision: RoundDecision


def run_round(context: RoundContext, state: FederationState, history: RunHistory) -> RoundEnd:
    """Run one round from the state and the history that the rounds before it left."""
    progress = plan_round(context, state, history)
    plan = progress.plan
    context.store.open_round(shown_plan(context, plan))
    failpoint("round.opened")

    ready = reserve(progress)
    failpoint("round.reserved")
    decision = judge(context, plan, len(ready), history)
    if decision.verdict == "publish":
        context.store.start_collecting(plan)
        failpoint("round.collecting")
        collected = train(progress, ready, state, history)
        failpoint("round.collected")
        progress.mirror_rows()
        failpoint("round.mirrored")
        decision = judge(context, plan, collected.total.num_updates, history)
    else:
        context.pool.release(plan, ready, "the round ended before training: below quorum")

    if decision.verdict != "publish":
        result = close_round(progress, None, decision.reason)
        context.store.record(result)
        return RoundEnd(state, history.after(plan, result.receipt), result, decision)

    published = apply_updates(progress, state, collected)
    weights_after = params.checksum(published.weights)
    context.store.note_aggregated(plan, weights_after)
    failpoint("round.aggregated")
    if is_evaluated(context.run, plan.round):
        evaluate_weights(progress, published)
        failpoint("round.evaluated")
    result = close_round(progress, weights_after)
    context.store.save_checkpoint(published, result)
    failpoint("round.published")
    context.store.record(result)
    failpoint("round.recorded")
    return RoundEnd(published, history.after(plan, result.receipt), result, decision)


def plan_round(context: RoundContext, state: FederationState, history: RunHistory) -> RoundProgress:
    """Fix who is asked and what each will do, before any hospital trains; who sits out for its failures is recorded."""
    run, number = context.run, state.round + 1
    left_out: dict[str, str] = {}
    if context.hospital_dp is not None:  # who is drawn there must not depend on who failed before
        hospitals, enough = context.hospital_dp.cohort(context.available, number), None
    else:
        left_out = history.failure_history.left_out(context.available, run.federation)
        able = [hospital for hospital in context.available if hospital not in left_out]
        hospitals = context.select(number, able)
        enough = enough_updates(run, len(able), len(hospitals))
    plan = RoundPlan(
        job=context.job,
        round=number,
        attempt=context.attempt,
        config_hash=run.config_hash,
        weights_checksum=params.checksum(state.weights),
        hospitals=hospitals,
        num_steps={hospital: steps_in_round(run, context.num_steps[hospital], number) for hospital in hospitals},
        learning_rate=learning_rate(run.training, number, run.federation.rounds),
        mechanisms={
            h: mechanism_in_round(run, context.mechanisms[h], number) for h in hospitals if h in context.mechanisms
        },
        deadline_s=run.federation.deadline_s,
        enough=enough,
        clip_norm=context.hospital_dp.clip_norm if context.hospital_dp is not None else None,
        # Of a secret cohort no ledger is charged, and which rows were seen of it is nobody's business.
        ledger_heads=context.mirror.heads(hospitals) if context.hospital_dp is None else {},
    )
    progress = RoundProgress(context, plan)
    for hospital, reason in left_out.items():
        progress.exclude(progress.failure(hospital, "select", reason, may_have_left=False))
    return progress


def reserve(progress: RoundProgress) -> list[str]:
    """Reserve the round's worst case at every hospital; who cannot afford it is left out, and that is recorded.

    The coordinator has mirrored every reservation before this returns, so that none can be forgotten unseen.
    """
    context, plan = progress.context, progress.plan
    if context.hospital_dp is not None:
        progress.spent[FEDERATION] = context.hospital_dp.reserve(plan)
        progress.ledger_rows.extend(context.hospital_dp.rows_after(context.mirror.heads([FEDERATION])))
    ready = []
    for hospital, answer in ask_to_reserve(progress).items():
        if isinstance(answer, ClientFailure):
            progress.exclude(answer)
            continue
        foreign = foreign_rows(hospital, answer)
        if foreign is not None:
            context.pool.release(plan, [hospital], foreign)
            progress.exclude(progress.failure(hospital, "reserve", foreign))
            continue
        progress.take_spent(hospital, answer)
        ready.append(hospital)
    refused = progress.mirror_rows()
    if refused:
        context.pool.release(plan, [h for h in ready if h in refused], "the coordinator could not mirror the ledger")
    return [hospital for hospital in ready if hospital not in refused]


def ask_to_reserve(progress: RoundProgress) -> dict[str, PrivacySpent | ClientFailure | None]:
    """Return every hospital's answer; one whose process or connection failed is asked again after a pause."""
    pool, plan = progress.context.pool, progress.plan
    answers = dict(pool.reserve(plan))
    for retry in range(1, progress.context.run.federation.retries + 1):
        again = hospitals_to_retry(answer for answer in answers.values() if isinstance(answer, ClientFailure))
        if not again or not progress.wait_before_retry(retry):
            break
        answers |= pool.reserve(plan.among(again))
    return answers


def train(progress: RoundProgress, ready: list[str], state: FederationState, history: RunHistory) -> CollectedUpdates:
    """Let the hospitals train from the round's weights and sum the updates that are sound."""
    strategy, expected = progress.context.strategy, expected_updates(progress.context, progress.plan, state)
    collector = UpdateCollector(progress, expected, history.late_plans)
    return collector.collect(ready, strategy.send(state.server_state, state.weights))


def judge(context: RoundContext, plan: RoundPlan, num_updates: int, history: RunHistory) -> RoundDecision:
    """Judge the round; under hospital-level DP it is always published, since abandoning it would reveal who came."""
    if context.hospital_dp is not None:
        return RoundDecision("publish", "whatever arrived is noised and published")
    rule = context.run.aggregation
    problem = why_too_few(rule.robust, num_updates) if rule.mode == "robust" else None
    return judge_round(context.run.federation, num_updates, len(plan.hospitals), history.failed_before, problem)


def apply_updates(progress: RoundProgress, state: FederationState, collected: CollectedUpdates) -> FederationState:
    """Let the strategy turn the mean update into the next weights; under hospital-level DP the noised one.

    In robust mode a rule over all updates takes the mean's place.
    """
    context, total = progress.context, collected.total
    extra_state: dict[str, Vector] = {}
    if context.hospital_dp is not None:
        progress.spent[FEDERATION] = context.hospital_dp.settle()
        mean = context.hospital_dp.release(total)
        extra_state.update(context.hospital_dp.server_state())
    elif context.combine is not None and collected.updates is not None:
        mean, robust_state = context.combine(collected.updates, state.server_state, state.weights)
        extra_state.update(robust_state)
    else:
        mean = weighted_mean(total)
    own_state = {name: value for name, value in state.server_state.items() if not is_not_strategy_state(name)}
    # Under hospital-level DP how many took part is nobody's business, the strategy's included.
    share = 1.0 if context.hospital_dp is not None else total.weight / sum(context.aggregation_weights.values())
    server_state, weights = context.strategy.step(own_state, state.weights, mean, share)
    return FederationState(state.round + 1, weights, {**server_state, **extra_state})


def is_not_strategy_state(name: str) -> bool:
    """Say whether a part of the server's state is not the strategy's: of hospital-level DP, or of a robust rule."""
    return name == CLIP_NORM or name.startswith(ROBUST_STATE)


def is_evaluated(run: RunConfig, number: int) -> bool:
    """Evaluate every `eval_every` rounds and always after the last."""
    return number % run.federation.eval_every == 0 or number == run.federation.rounds


def evaluate_weights(progress: RoundProgress, state: FederationState) -> None:
    """Score the new weights at every hospital; a hospital that cannot is recorded, and the round stands."""
    context, weights = progress.context, released_weights(state.server_state, state.weights)
    deadline_s = context.run.federation.deadline_s
    for answer in context.pool.evaluate(state.round, context.evaluated, weights, pictures=False, deadline_s=deadline_s):
        if isinstance(answer, SiteEvaluation):
            progress.metrics.setdefault(answer.hospital, {}).update(answer.metrics)
        else:
            progress.failures.append(answer)


def close_round(progress: RoundProgress, weights_after: str | None, reason: str = "") -> RoundResult:
    """Write the receipt: who was asked, who trained, who did not and why; `reason` where nothing is published."""
    context, plan = progress.context, shown_plan(progress.context, progress.plan)
    if context.secret_cohorts:
        progress = progress.without_cohort()
    # Under hospital-level DP an update is not noised before it is summed, and its hash would confirm a guess of it.
    hashes = {} if context.hospital_dp is not None else progress.update_hashes
    receipt = Receipt(
        **plan.receipt_fields,
        trained=tuple(sorted(progress.trained)),
        failures=tuple(sorted(progress.failures, key=lambda failure: failure.hospital)),
        update_hashes=dict(sorted(hashes.items())),
        spent=dict(sorted(progress.spent.items())),
        weights_after=weights_after,
        published=weights_after is not None,
        ended_at=stamp(clock_of(context.secret_cohorts)()),
        secret_cohort=context.secret_cohorts,
        reason=reason,
        late=dict(sorted(progress.late.items())),
        budget_hash=budget_hash(context.run),
        attackers=context.run.attack.words if context.run.attack is not None else "",
    )
    duration_s = 0.0 if context.secret_cohorts else round(time.monotonic() - progress.started, 3)
    return RoundResult(round=plan.round, receipt=receipt, metrics=progress.metrics, duration_s=duration_s)


def shown_plan(context: RoundContext, plan: RoundPlan) -> RoundPlan:
    """Return the plan as it may be written down: without the names of a cohort that is secret."""
    if not context.secret_cohorts:
        return plan
    return plan.model_copy(update={"hospitals": (), "num_steps": {}, "ledger_heads": {}})
