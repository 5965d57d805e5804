"""Collecting a round's updates: each is judged, signed and in the sum, or refused with a reason; none counts twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from medfl_ray import params
from medfl_ray.aggregation.fixed_point import PartialSum, add_update, empty_sum, merge_sums
from medfl_ray.aggregation.updates import Updates
from medfl_ray.errors import UpdateRejected
from medfl_ray.failpoints import failpoint
from medfl_ray.federation.attacks import altered_updates
from medfl_ray.federation.events import HospitalState
from medfl_ray.federation.policies import hospitals_to_retry, pause_before
from medfl_ray.federation.ports import FederationState, SummedUpdates, TrainedHospital, TrainingAnswer
from medfl_ray.federation.round_context import RoundContext, RoundProgress, foreign_rows
from medfl_ray.federation.screening import Expected, why_rejected
from medfl_ray.federation.signatures import update_digest
from medfl_ray.messages import ClientFailure, ClientUpdate, RoundPlan


def collect_updates(
    context: RoundContext, plan: RoundPlan, ready: Sequence[str], state: FederationState, progress: RoundProgress
) -> PartialSum:
    """Sum the updates as they arrive; one that does not fit is refused with a reason and the round goes on.

    A hospital whose process or connection failed is asked again after a pause, where that is no second release.
    """
    expected = expected_updates(context, plan, state)
    total, asked, retry = empty_sum(expected.size), list(ready), 1
    if context.combine is not None or context.run.needs_every_update:
        progress.updates = Updates(expected.size)
    sent = context.strategy.send(state.server_state, state.weights)
    unprotected = [hospital for hospital in ready if hospital not in plan.mechanisms and context.hospital_dp is None]
    while True:
        known = len(progress.failures)
        total = take_answers(context, expected, asked, sent, total, progress)
        asked = hospitals_to_retry(progress.failures[known:], unprotected)
        if not asked or not wait_before_retry(context, plan, progress, retry):
            return add_attacks(context, expected, total, progress)
        retry += 1


def wait_before_retry(context: RoundContext, plan: RoundPlan, progress: RoundProgress, retry: int) -> bool:
    """Wait before hospitals are asked again; return whether they may be: the retries, or the time, may be used up."""
    wait_s = pause_before(retry)
    if retry > context.run.federation.retries or not progress.time_for(wait_s, plan.deadline_s):
        return False
    time.sleep(wait_s)
    return True


def take_answers(
    context: RoundContext,
    expected: Expected,
    asked: Sequence[str],
    weights: params.Vector,
    total: PartialSum,
    progress: RoundProgress,
) -> PartialSum:
    """Ask hospitals to train and add what they answer, until all have, the deadline passes, or it is enough."""
    plan = expected.plan
    for hospital in asked:
        context.tell(HospitalState(hospital=hospital, state="training", num_steps=plan.num_steps[hospital]))
    answered: set[str] = set()
    with closing(context.pool.train(plan, asked, weights)) as answers:
        for answer in answers:
            total = take_answer(context, expected, answer, total, progress)
            answered.update(hospitals_of(answer))
            if plan.enough is not None and total.num_updates + len(progress.held) >= plan.enough:
                break
    surplus = [hospital for hospital in asked if hospital not in answered]
    if plan.enough is not None and surplus:
        cancel_surplus(context, plan, surplus, progress)
    return total


def cancel_surplus(context: RoundContext, plan: RoundPlan, surplus: Sequence[str], progress: RoundProgress) -> None:
    """Take down who was not needed; who has not begun to train gets its reservation back."""
    reason = f"{plan.enough} others had delivered, which is enough"
    context.pool.release(plan, surplus, reason)
    for hospital in surplus:
        progress.failures.append(
            ClientFailure(hospital=hospital, round=plan.round, attempt=plan.attempt, stage="surplus", reason=reason)
        )
        context.tell(HospitalState(hospital=hospital, state="left_out", detail=reason))


def take_answer(
    context: RoundContext, expected: Expected, answer: TrainingAnswer, total: PartialSum, progress: RoundProgress
) -> PartialSum:
    """Add one answer to the sum, or take down why it is not in it."""
    reason = answer.reason if isinstance(answer, ClientFailure) else ""
    if isinstance(answer, ClientFailure):
        progress.failures.append(answer)
    else:
        try:
            if isinstance(answer, SummedUpdates):
                total = add_sum(context, total, answer, expected.plan, progress)
            else:
                total = screen_and_add(context, total, answer, expected_of(context, expected, answer), progress)
        except UpdateRejected as error:
            reason = str(error)
            refuse(expected.plan, answer, reason, progress)
    for hospital in hospitals_of(answer):
        context.tell(state_after(hospital, answer, reason))
    return total


def state_after(hospital: str, answer: TrainingAnswer, reason: str) -> HospitalState:
    """Say what became of a hospital's answer; `reason` where it is not in the sum."""
    if reason:
        return HospitalState(hospital=hospital, state="failed", detail=reason)
    if not isinstance(answer, ClientUpdate):
        return HospitalState(hospital=hospital, state="done")
    size_bytes = answer.delta.nbytes
    return HospitalState(hospital=hospital, state="done", update_bytes=size_bytes, duration=answer.duration)


def expected_updates(context: RoundContext, plan: RoundPlan, state: FederationState) -> Expected:
    """Say what the updates of a round have to fit."""
    return Expected(
        plan,
        context.layout,
        context.aggregation_weights,
        params.norm(state.weights),
        may_be_zero=context.hospital_dp is not None,
        extra=context.strategy.extra(context.layout.size),
        max_update_norm=context.run.aggregation.max_update_norm,
    )


def expected_of(context: RoundContext, expected: Expected, update: ClientUpdate) -> Expected:
    """Say what one update has to fit: the round's plan, or that of the last round where it missed the deadline."""
    late_plans = context.history.late_plans.get(update.hospital)
    if context.run.federation.stragglers == "keep" and late_plans is not None and update.round != expected.plan.round:
        return replace(expected, plan=late_plans)
    return expected


def hospitals_of(answer: TrainingAnswer) -> list[str]:
    """Return the hospitals that an answer is about."""
    return [one.hospital for one in answer.trained] if isinstance(answer, SummedUpdates) else [answer.hospital]


def refuse(plan: RoundPlan, answer: ClientUpdate | SummedUpdates, reason: str, progress: RoundProgress) -> None:
    """Record why nothing of an answer was used, for each hospital that it is about."""
    progress.failures.extend(
        ClientFailure(hospital=hospital, round=plan.round, attempt=plan.attempt, stage="screen", reason=reason)
        for hospital in hospitals_of(answer)
    )


def screen_and_add(
    context: RoundContext, total: PartialSum, update: ClientUpdate, expected: Expected, progress: RoundProgress
) -> PartialSum:
    """Add an update that belongs to this round and is sound; UpdateRejected says why one is not."""
    is_late = expected.plan is context.history.late_plans.get(update.hospital)
    reason = why_rejected(update, expected, progress.late if is_late else progress.trained | progress.held.keys())
    reason = reason or foreign_rows(update.hospital, update.spent)
    if reason is not None:
        raise UpdateRejected(reason)
    checksum = params.checksum(update.delta)
    key = context.keys.get(update.hospital)
    if key is not None and not context.is_signed(key, update_digest(context.job, update, checksum), update.signature):
        raise UpdateRejected("the update's signature is not the hospital's; it was altered, or somebody else sent it")
    if is_attacker(context, update.hospital):
        progress.held[update.hospital] = update
        return total
    total = add(context, total, update, progress)
    if is_late:
        note_late(context, expected.plan, update, checksum, progress)
    else:
        note_trained(context, expected.plan, [update], progress)
        progress.update_hashes[update.hospital] = checksum
    return total


def add(context: RoundContext, total: PartialSum, update: ClientUpdate, progress: RoundProgress) -> PartialSum:
    """Add a sound update to the sum, and to all updates where a rule needs them."""
    if context.hospital_dp is not None:
        return add_update(total, context.hospital_dp.admit(update), 1)
    total = add_update(total, update.delta, update.aggregation_weight)
    if progress.updates is not None:
        progress.updates.add(update.hospital, update.delta, update.aggregation_weight)
    return total


def is_attacker(context: RoundContext, hospital: str) -> bool:
    """Say whether a hospital sends something else than what it trained, in a study of attacks."""
    attack = context.run.attack
    return attack is not None and attack.alters_updates and hospital in attack.hospitals


def add_attacks(context: RoundContext, expected: Expected, total: PartialSum, progress: RoundProgress) -> PartialSum:
    """Alter what the attackers trained, now that the others' updates are known, and judge and add it like theirs."""
    attack = context.run.attack
    if attack is None or progress.updates is None or not progress.held:
        return total
    seed = (context.run.federation.seed, expected.plan.round)
    for update in altered_updates(attack, progress.updates, progress.held, context.run.aggregation, seed):
        reason = why_rejected(update, expected, progress.trained)
        if reason is not None:
            refuse(expected.plan, update, reason, progress)
            continue
        try:
            total = add(context, total, update, progress)
        except UpdateRejected as error:
            refuse(expected.plan, update, str(error), progress)
            continue
        note_trained(context, expected.plan, [update], progress)
        progress.update_hashes[update.hospital] = params.checksum(update.delta)
    progress.held.clear()
    return total


def add_sum(
    context: RoundContext, total: PartialSum, answer: SummedUpdates, plan: RoundPlan, progress: RoundProgress
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
    if progress.updates is not None:
        raise UpdateRejected("the updates came as a sum; a robust rule needs each of them")
    for one in answer.trained:
        foreign = foreign_rows(one.hospital, one.spent)
        if foreign is not None:
            raise UpdateRejected(foreign)
    if not set(hospitals) <= plan.num_steps.keys() - progress.trained or len(set(hospitals)) < len(hospitals):
        raise UpdateRejected("the sum holds a hospital that was not asked or has delivered already")
    total = merge_sums(total, answer.total)
    note_trained(context, plan, answer.trained, progress)
    return total


def note_trained(
    context: RoundContext, plan: RoundPlan, those: Sequence[ClientUpdate | TrainedHospital], progress: RoundProgress
) -> None:
    """Take down whose updates are in the sum, with their figures and what they have spent."""
    if not context.secret_cohorts:
        context.store.note_delivered(plan, [one.hospital for one in those])
    failpoint("round.update")
    for one in those:
        progress.trained.add(one.hospital)
        progress.metrics[one.hospital] = {} if context.secret_cohorts else dict(one.metrics)
        if one.spent is not None:
            progress.spent[one.hospital] = progress.take_rows(one.spent)


def note_late(
    context: RoundContext, plan: RoundPlan, update: ClientUpdate, checksum: str, progress: RoundProgress
) -> None:
    """Take down that an update of an earlier round, which missed its deadline, is in this round's sum."""
    context.store.note_delivered(plan, [update.hospital])
    progress.late[update.hospital] = update.round
    progress.update_hashes[f"{update.hospital}, round {update.round}"] = checksum
    if update.spent is not None:
        progress.spent[update.hospital] = progress.take_rows(update.spent)
