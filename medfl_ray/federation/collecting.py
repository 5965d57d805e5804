"""Collecting a round's updates: each is judged, signed and in the sum, or refused with a reason; none counts twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from medfl_ray import params
from medfl_ray.aggregation.fixed_point import PartialSum, add_update, empty_sum, merge_sums
from medfl_ray.aggregation.updates import Updates
from medfl_ray.errors import UpdateRejected
from medfl_ray.federation.attacks import altered_updates
from medfl_ray.federation.events import HospitalState
from medfl_ray.federation.policies import hospitals_to_retry
from medfl_ray.federation.ports import FederationState, SummedUpdates, TrainingAnswer
from medfl_ray.federation.round_context import RoundContext, foreign_rows
from medfl_ray.federation.round_progress import RoundProgress
from medfl_ray.federation.screening import Expected, why_rejected
from medfl_ray.federation.signatures import update_digest
from medfl_ray.messages import ClientFailure, ClientUpdate, RoundPlan


@dataclass(frozen=True, eq=False)
class CollectedUpdates:
    """The sum of a round's updates; `updates` holds each of them where a rule needs them all, else None."""

    total: PartialSum
    updates: Updates | None


class UpdateCollector:
    """Judges a round's answers as they arrive and adds those that are sound.

    `late_plans` are the plans of updates that missed the last round's deadline. What attackers of a study trained is
    held back until the others' updates are known.
    """

    def __init__(self, progress: RoundProgress, expected: Expected, late_plans: Mapping[str, RoundPlan]) -> None:
        """Take the round, what an update of it has to fit, and the plans of the updates that may still arrive."""
        self._progress, self._context, self._plan = progress, progress.context, progress.plan
        self._expected, self._late_plans = expected, late_plans
        self._held: dict[str, ClientUpdate] = {}
        self._updates: Updates | None = None
        self.total = empty_sum(expected.size)

    def collect(self, ready: Sequence[str], sent: params.Vector) -> CollectedUpdates:
        """Sum the updates as they arrive; one that does not fit is refused with a reason and the round goes on.

        A hospital whose process or connection failed is asked again after a pause, where that is no second release.
        """
        context, progress = self._context, self._progress
        if context.combine is not None or context.run.needs_every_update:
            self._updates = Updates(self._expected.size)
        has_hospital_dp = context.hospital_dp is not None
        unprotected = [h for h in ready if h not in self._plan.mechanisms and not has_hospital_dp]
        asked, retry = list(ready), 1
        while True:
            known = len(progress.failures)
            self._ask(asked, sent)
            asked = hospitals_to_retry(progress.failures[known:], unprotected)
            if not asked or not progress.wait_before_retry(retry):
                self._add_attacks()
                return CollectedUpdates(self.total, self._updates)
            retry += 1

    def _ask(self, asked: Sequence[str], sent: params.Vector) -> None:
        """Ask hospitals to train and add what they answer, until all have, the deadline passes, or it is enough."""
        plan = self._plan
        for hospital in asked:
            self._context.tell(HospitalState(hospital=hospital, state="training", num_steps=plan.num_steps[hospital]))
        answered: set[str] = set()
        with closing(self._context.pool.train(plan, asked, sent)) as answers:
            for answer in answers:
                self._take(answer)
                answered.update(hospitals_of(answer))
                if plan.enough is not None and self.total.num_updates + len(self._held) >= plan.enough:
                    break
        surplus = [hospital for hospital in asked if hospital not in answered]
        if plan.enough is not None and surplus:
            self._cancel_surplus(surplus)

    def _cancel_surplus(self, surplus: Sequence[str]) -> None:
        """Record who was not needed; a hospital that has not begun to train gets its reservation back."""
        reason = f"{self._plan.enough} others had delivered, which is enough"
        self._context.pool.release(self._plan, surplus, reason)
        for hospital in surplus:
            self._progress.exclude(self._progress.failure(hospital, "surplus", reason))

    def _take(self, answer: TrainingAnswer) -> None:
        """Add one answer to the sum, or record why it is not in it."""
        reason = answer.reason if isinstance(answer, ClientFailure) else ""
        if isinstance(answer, ClientFailure):
            self._progress.failures.append(answer)
        else:
            try:
                if isinstance(answer, SummedUpdates):
                    self.add_sum(answer)
                else:
                    self.screen_and_add(answer)
            except UpdateRejected as error:
                reason = str(error)
                self._progress.refuse(hospitals_of(answer), reason)
        for hospital in hospitals_of(answer):
            self._context.tell(state_after(hospital, answer, reason))

    def screen_and_add(self, update: ClientUpdate) -> None:
        """Add an update that belongs to this round, or to the last one where it may be late, and is sound.

        Raises:
          UpdateRejected: it does not fit the plan, has been delivered already, or bears somebody else's signature.
        """
        context, progress, expected = self._context, self._progress, self._expected_of(update)
        is_late = expected.plan is self._late_plans.get(update.hospital)
        delivered = progress.late if is_late else progress.trained | self._held.keys()
        reason = why_rejected(update, expected, delivered) or foreign_rows(update.hospital, update.spent)
        if reason is not None:
            raise UpdateRejected(reason)
        checksum = params.checksum(update.delta)
        key = context.keys.get(update.hospital)
        if key is not None and not context.is_signed(
            key, update_digest(context.job, update, checksum), update.signature
        ):
            raise UpdateRejected(
                "the update's signature is not the hospital's; it was altered, or somebody else sent it"
            )
        if self._is_attacker(update.hospital):
            self._held[update.hospital] = update
            return
        self._add(update)
        if is_late:
            progress.note_late(update, expected.plan, checksum)
        else:
            progress.note_trained([update])
            progress.update_hashes[update.hospital] = checksum

    def add_sum(self, answer: SummedUpdates) -> None:
        """Add updates that were summed where they were trained.

        Raises:
          UpdateRejected: the sum, or a hospital in it, does not belong to this round.
        """
        plan, hospitals = self._plan, hospitals_of(answer)
        if (answer.round, answer.attempt) != (plan.round, plan.attempt):
            raise UpdateRejected(
                f"the sum is of round {answer.round}, attempt {answer.attempt}; this is round {plan.round}, "
                f"attempt {plan.attempt}"
            )
        wrong_layout = answer.layout_checksum != self._expected.layout.checksum
        if wrong_layout or answer.total.num_updates != len(hospitals):
            raise UpdateRejected("the sum's layout or number of updates is not what it says")
        if self._updates is not None:
            raise UpdateRejected("the updates came as a sum; a robust rule needs each of them")
        for one in answer.trained:
            foreign = foreign_rows(one.hospital, one.spent)
            if foreign is not None:
                raise UpdateRejected(foreign)
        awaited = plan.num_steps.keys() - self._progress.trained
        if not set(hospitals) <= awaited or len(set(hospitals)) < len(hospitals):
            raise UpdateRejected("the sum holds a hospital that was not asked or has delivered already")
        self.total = merge_sums(self.total, answer.total)
        self._progress.note_trained(answer.trained)

    def _expected_of(self, update: ClientUpdate) -> Expected:
        """Return what one update has to fit: this round's plan, or the last one's where it missed that deadline."""
        late_plan = self._late_plans.get(update.hospital)
        keeps_late = self._context.run.federation.stragglers == "keep"
        if keeps_late and late_plan is not None and update.round != self._plan.round:
            return replace(self._expected, plan=late_plan)
        return self._expected

    def _add(self, update: ClientUpdate) -> None:
        """Add a sound update to the sum, and to all updates where a rule needs them."""
        if self._context.hospital_dp is not None:
            self.total = add_update(self.total, self._context.hospital_dp.admit(update), 1)
            return
        self.total = add_update(self.total, update.delta, update.aggregation_weight)
        if self._updates is not None:
            self._updates.add(update.hospital, update.delta, update.aggregation_weight)

    def _is_attacker(self, hospital: str) -> bool:
        """Return whether a hospital sends something else than what it trained, in a study of attacks."""
        attack = self._context.run.attack
        return attack is not None and attack.alters_updates and hospital in attack.hospitals

    def _add_attacks(self) -> None:
        """Alter what the attackers trained, now that all other updates are known, and judge and add it like those."""
        attack, progress = self._context.run.attack, self._progress
        if attack is None or self._updates is None or not self._held:
            return
        seed = (self._context.run.federation.seed, self._plan.round)
        for update in altered_updates(attack, self._updates, self._held, self._context.run.aggregation, seed):
            reason = why_rejected(update, self._expected, progress.trained)
            if reason is not None:
                progress.refuse([update.hospital], reason)
                continue
            try:
                self._add(update)
            except UpdateRejected as error:
                progress.refuse([update.hospital], str(error))
                continue
            progress.note_trained([update])
            progress.update_hashes[update.hospital] = params.checksum(update.delta)
        self._held.clear()


def expected_updates(context: RoundContext, plan: RoundPlan, state: FederationState) -> Expected:
    """Return what the updates of a round have to fit."""
    return Expected(
        plan,
        context.layout,
        context.aggregation_weights,
        params.norm(state.weights),
        may_be_zero=context.hospital_dp is not None,
        extra=context.strategy.extra(context.layout.size),
        max_update_norm=context.run.aggregation.max_update_norm,
    )


def hospitals_of(answer: TrainingAnswer) -> list[str]:
    """Return the hospitals that an answer is about."""
    return [one.hospital for one in answer.trained] if isinstance(answer, SummedUpdates) else [answer.hospital]


def state_after(hospital: str, answer: TrainingAnswer, reason: str) -> HospitalState:
    """Return what became of a hospital's answer; `reason` where it is not in the sum."""
    if reason:
        return HospitalState(hospital=hospital, state="failed", detail=reason)
    if not isinstance(answer, ClientUpdate):
        return HospitalState(hospital=hospital, state="done")
    size_bytes = answer.delta.nbytes
    return HospitalState(hospital=hospital, state="done", update_bytes=size_bytes, duration=answer.duration)
