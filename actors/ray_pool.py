"""Hospitals as Ray actors, behind the same port as the in-process pool.

The weights are put into the object store once a round. At most one task per actor is under way, so
nothing queues without bound. An actor that dies is a `ClientFailure`; Ray restarts it for the next round,
and no task is retried, because a second training would be a second release. An actor that misses a deadline
stays busy with what it does and is asked nothing until it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster import check_pinned
from actors.hospital_actor import HospitalActor
from actors.names import actor_name, group_name
from actors.placement import Place, Policy, place_actors
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.errors import ClusterError
from medfl_ray.federation.hospital_rules.failures import deadline_failure, evaluation_failure, start_failure
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.federation.round_clock import RoundClock
from medfl_ray.federation.studies.baselines import CENTRAL
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    FailureStage,
    HospitalInfo,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
)
from medfl_ray.params import Vector

START_TIMEOUT_S = 600.0
NAME_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
PATIENCE = 10
"""After so many deadlines, none taken for shorter than SHORT_S, a process that has not answered is ended."""
SHORT_S = 30.0
ActorGroup = tuple[str, ...]
Call = Callable[[Any], Any]
Fail = Callable[[str, str, bool], ClientFailure]
"""Makes a failure of (hospital, reason, whether the fault may pass)."""


@dataclass(frozen=True)
class Unfinished:
    """A task that missed its deadline: its answer to come, whose it is, what it does, and how long it may go on."""

    answer: Any
    hospital: str
    doing: str
    until: float


class RayPool:
    """A pool of hospital actors; with fewer actors than hospitals, each actor holds several."""

    def __init__(
        self,
        specs: Sequence[HospitalSpec],
        job: str,
        num_actors: int | None = None,
        gpus_per_actor: float = 0.0,
        keeps_late: bool = False,
        placement: Policy = "spread",
    ) -> None:
        """Take the hospitals; with `keeps_late`, an update that misses its deadline is yielded in the next round.

        Raises:
          ClusterError: a hospital's ledger has no node of its own, or hospitals of different nodes share an actor.
        """
        self._specs = {spec.policy.hospital: spec for spec in specs}
        self._job = job
        self._gpus_per_actor = gpus_per_actor
        self._keeps_late = keeps_late
        self._actors: dict[str, Any] = {}
        self._unfinished: dict[ActorGroup, Unfinished] = {}
        self._clock = RoundClock()
        self._placement: Policy = placement
        check_pinned(ledgers_to_pin(specs), ray.nodes())  # type: ignore[no-untyped-call]
        self._groups = assign_to_actors(sorted(name for name in self._specs if name != CENTRAL), num_actors)
        self._places = self._find_places()

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        names = [name for group in self._groups for name in group]
        calls = {name: (lambda actor, name=name: actor.describe.remote(name)) for name in names}
        fail = lambda name, why, _: start_failure(name, why)  # noqa: E731
        return [answer for _, answer in self._gather(calls, fail, "starting", self._ends(START_TIMEOUT_S))]

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        addressed_plans = {name: plan.addressed_to(name) for name in plan.hospitals}
        calls = {
            name: (lambda actor, name=name: actor.reserve.remote(name, addressed_plans[name]))
            for name in plan.hospitals
        }
        fail = failure_of(plan, "reserve", may_have_left=False)
        ends = self._clock.end(plan) or self._ends(START_TIMEOUT_S)
        answers: dict[str, Any] = dict(self._gather(calls, fail, f"reserving for round {plan.round}", ends))
        return {name: answers[name] for name in plan.hospitals}

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        addressed_plans = {name: plan.addressed_to(name) for name in hospitals}
        calls = {
            name: (lambda actor, name=name: actor.release.remote(name, addressed_plans[name], reason))
            for name in hospitals
        }
        fail, ends = failure_of(plan, "reserve", may_have_left=False), self._ends(plan.deadline_s or START_TIMEOUT_S)
        list(self._gather(calls, fail, f"releasing round {plan.round}", ends))

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Generator[ClientUpdate | ClientFailure, None, None]:
        shared = put(weights)
        addressed_plans = {name: plan.addressed_to(name) for name in hospitals}
        calls = {
            name: (lambda actor, name=name: actor.train.remote(name, addressed_plans[name], shared))
            for name in hospitals
        }
        late = lambda name: deadline_failure(name, plan)  # noqa: E731
        doing = f"training for round {plan.round}"
        answers = self._gather(calls, failure_of(plan, "train"), doing, self._clock.end(plan), late, self._keeps_late)
        for _, answer in answers:
            yield answer

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        shared = put(weights)
        calls = {n: (lambda actor, n=n: actor.evaluate.remote(n, round, shared, pictures)) for n in hospitals}
        fail = lambda name, why, _: evaluation_failure(name, round, why)  # noqa: E731
        for _, answer in self._gather(calls, fail, f"evaluating round {round}", self._ends(deadline_s)):
            yield answer

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        shared = put(weights)
        if CENTRAL in plans:
            self._groups = [*self._groups, (CENTRAL,)]
        calls = {
            n: (lambda actor, n=n, plan=plan: actor.train_alone.remote(n, plan, shared)) for n, plan in plans.items()
        }
        fail = lambda name, why, _: start_failure(name, why).model_copy(  # noqa: E731
            update={"stage": "train", "may_have_left": True}
        )
        for _, answer in self._gather(calls, fail, "training a baseline", None):
            yield answer

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        names = [name for group in self._groups for name in group]
        calls = {name: (lambda actor, name=name: actor.export_ledger.remote(name)) for name in names}
        fail = lambda name, why, _: evaluation_failure(name, 0, why)  # noqa: E731
        answers = self._gather(calls, fail, "exporting its ledger", self._ends(START_TIMEOUT_S))
        return {name: answer for name, answer in answers if isinstance(answer, dict)}

    def close(self) -> None:
        """End the actors; each first removes what it keeps of images, as far as it answers in time."""
        closing = [actor.close.remote() for actor in self._actors.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()
        self._unfinished.clear()

    def _gather(
        self,
        calls: Mapping[str, Call],
        fail: Fail,
        doing: str,
        ends: float | None,
        late: Callable[[str], ClientFailure] | None = None,
        with_unfinished: bool = False,
    ) -> Generator[tuple[str, Any], None, None]:
        """Run one call per hospital, one at a time per actor, and yield answers as they arrive, until time is up.

        Args:
          doing: what the calls do, for whoever finds the actor busy with one later.
          ends: when time is up, on the monotonic clock; None for never.
          late: makes the failure of who is not done by then; that of `fail` when absent.
          with_unfinished: whether answers to earlier trainings are yielded too, if they come in time.
        """
        queues = {group: [name for name in group if name in calls] for group in self._groups}
        started = time.monotonic()
        pending: dict[Any, tuple[ActorGroup, str]] = {}
        try:
            while True:
                for name, answer in self._take_unfinished(fail):
                    if with_unfinished and isinstance(answer, ClientUpdate):
                        yield name, answer
                yield from self._turn_away(queues, fail)
                self._submit(queues, calls, pending)
                if not pending:
                    return
                ready = self._wait([*pending, *(one.answer for one in self._unfinished.values())], ends)
                if ready is None:
                    break
                if ready in pending:
                    _, name = pending.pop(ready)
                    yield name, self._take(ready, name, fail)
        finally:  # also where whoever asked has had enough
            now = time.monotonic()
            until = now + PATIENCE * max(SHORT_S, (ends or now) - started)
            for answer, (group, name) in pending.items():
                self._unfinished[group] = Unfinished(answer, name, doing, until)
        missing = [name for _, name in pending.values()] + [name for queue in queues.values() for name in queue]
        for name in missing:
            yield name, late(name) if late is not None else fail(name, f"not done with {doing} in time", False)

    def _wait(self, answers: list[Any], ends: float | None) -> Any:
        """Return the first answer that is there, or None when time is up."""
        timeout = None if ends is None else max(0.0, ends - time.monotonic())
        ready, _ = ray.wait(answers, num_returns=1, timeout=timeout)
        return ready[0] if ready else None

    def _take_unfinished(self, fail: Fail) -> Iterator[tuple[str, Any]]:
        """Yield what actors have finished that had missed a deadline; they can be asked again.

        One that is not done after many deadlines hangs, and its process is ended; Ray starts another.
        """
        for group, one in list(self._unfinished.items()):
            if time.monotonic() > one.until:
                ray.kill(self._actor(group), no_restart=False)
                del self._unfinished[group]
            elif ray.wait([one.answer], timeout=0)[0]:
                del self._unfinished[group]
                yield one.hospital, self._take(one.answer, one.hospital, fail)

    def _turn_away(self, queues: dict[ActorGroup, list[str]], fail: Fail) -> Iterator[tuple[str, Any]]:
        """Answer for hospitals whose actor is still busy with an earlier round."""
        for group, one in self._unfinished.items():
            while queues.get(group):
                name = queues[group].pop(0)
                yield name, fail(name, f"its process is still {one.doing}; it is asked when that is done", False)

    def _submit(
        self, queues: dict[ActorGroup, list[str]], calls: Mapping[str, Call], pending: dict[Any, tuple[ActorGroup, str]]
    ) -> None:
        busy = {group for group, _ in pending.values()}
        for group, queue in queues.items():
            if queue and group not in busy:
                name = queue.pop(0)
                pending[calls[name](self._actor(group))] = (group, name)

    def _take(self, reference: Any, name: str, fail: Fail) -> Any:
        try:
            return ray.get(reference)
        except RayActorError:
            return fail(name, "the hospital's process ended before it answered; Ray restarts it", True)
        except RayTaskError:  # which error it was may tell of a patient
            return fail(name, "the hospital's process failed; its own log has the details", False)
        except RayError as error:
            return fail(name, f"Ray lost the hospital's answer ({type(error).__name__})", True)

    def _find_places(self) -> dict[ActorGroup, Place]:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        central = [(CENTRAL,)] if CENTRAL in self._specs else []  # its share is kept free from the start
        return place_actors([*self._groups, *central], nodes, self._placement, self._gpus_per_actor)

    @staticmethod
    def _ends(seconds: float | None) -> float | None:
        return None if seconds is None else time.monotonic() + seconds

    def _actor(self, group: ActorGroup) -> Any:
        name = group_name(group)
        if name not in self._actors:
            options = self._places[group].options()
            remote = ray.remote(HospitalActor).options(name=actor_name(self._job, "hospital", name), **options)
            self._actors[name] = create_named(remote, [self._specs[hospital] for hospital in group])
        return self._actors[name]


def create_named(remote: Any, specs: Sequence[HospitalSpec]) -> Any:
    """Create an actor; where one of its name is still ending, with the coordinator that had it, wait for that.

    Raises:
      ClusterError: another one keeps the name.
    """
    ends = time.monotonic() + NAME_TIMEOUT_S
    while True:
        try:
            return remote.remote(specs)
        except ValueError:
            if time.monotonic() > ends:
                raise ClusterError(
                    f"the actor of hospital {specs[0].policy.hospital!r} is already there: another process of this "
                    "cluster runs the same folder. Wait until it ends, or end it"
                ) from None
            time.sleep(0.2)


def put(weights: Vector) -> Any:
    """Put weights into the object store.

    Raises:
      ClusterError: it is full, and its disk for spilling too.
    """
    try:
        return ray.put(weights)
    except RayError as error:
        raise ClusterError(
            f"Ray's object store did not take the weights ({type(error).__name__}); give the cluster more memory or "
            "disk, then continue with medfl-ray run --resume"
        ) from None


def failure_of(plan: RoundPlan, stage: FailureStage, may_have_left: bool = True) -> Fail:
    """Return what makes a failure of a hospital in a round."""

    def build(name: str, why: str, transient: bool) -> ClientFailure:
        return ClientFailure(
            hospital=name,
            round=plan.round,
            attempt=plan.attempt,
            stage=stage,
            reason=why,
            may_have_left=may_have_left,
            transient=transient,
        )

    return build


def ledgers_to_pin(specs: Sequence[HospitalSpec]) -> list[str]:
    """Return the hospitals whose ledger outlives the run and so belongs to one node.

    The central baseline is among them: it opens every hospital's ledger, which only one node could have. Private data
    have one whatever the run's privacy.
    """
    kept = ("private", "public") if specs and specs[0].run.privacy.enable_dp else ("private",)
    return [spec.policy.hospital for spec in specs if spec.policy.declared in kept]


def assign_to_actors(names: Sequence[str], num_actors: int | None) -> list[tuple[str, ...]]:
    """Deal hospitals to actors in turn; one actor each when no number is given."""
    count = min(num_actors or len(names), len(names))
    return [tuple(names[start::count]) for start in range(count)]
