"""Hospitals as Ray actors, behind the same port as the in-process pool.

The weights are put into the object store once a round. At most one task per actor is under way, so
nothing queues without bound. An actor that dies is a `ClientFailure`; Ray restarts it for the next round,
and no task is retried, because a second training would be a second release.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.cluster import check_pinned
from actors.hospital import HospitalActor, HospitalSpec
from medfl_ray.federation.baselines import CENTRAL
from medfl_ray.federation.local_pool import deadline_failure, start_failure
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, PrivacySpent, RoundPlan, SiteEvaluation
from medfl_ray.params import Vector

Stage = Literal["start", "reserve", "train", "evaluate"]
START_TIMEOUT_S = 600.0


class RayPool:
    """A pool of hospital actors; with fewer actors than hospitals, each actor holds several."""

    def __init__(
        self, specs: Sequence[HospitalSpec], job: str, num_actors: int | None = None, gpus_per_actor: float = 0.0
    ) -> None:
        self._specs = {spec.policy.hospital: spec for spec in specs}
        self._job = job
        self._gpus_per_actor = gpus_per_actor
        self._actors: dict[str, Any] = {}
        check_pinned(ledgers_to_pin(specs), ray.nodes())  # type: ignore[no-untyped-call]
        self._homes = deal(sorted(name for name in self._specs if name != CENTRAL), num_actors)

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        names = [name for home in self._homes for name in home]
        calls = {name: (lambda actor, name=name: actor.describe.remote(name)) for name in names}
        return list(self._gather(calls, lambda name, why: start_failure(name, why), START_TIMEOUT_S))

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        told = {name: plan.addressed_to(name) for name in plan.hospitals}
        calls = {name: (lambda actor, name=name: actor.reserve.remote(name, told[name])) for name in plan.hospitals}
        fail = self._failure("reserve", plan.round, plan.attempt, left_host=False)
        answers: dict[str, Any] = dict(self._gather_named(calls, fail, plan.deadline_s))
        return {name: answers[name] for name in plan.hospitals}

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        calls = {name: (lambda actor, name=name: actor.release.remote(name, plan, reason)) for name in hospitals}
        list(self._gather(calls, self._failure("reserve", plan.round, plan.attempt), plan.deadline_s))

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Iterator[ClientUpdate | ClientFailure]:
        shared = ray.put(weights)
        told = {name: plan.addressed_to(name) for name in hospitals}
        calls = {name: (lambda actor, name=name: actor.train.remote(name, told[name], shared)) for name in hospitals}
        fail = self._failure("train", plan.round, plan.attempt)
        late = lambda name: deadline_failure(name, plan)  # noqa: E731
        yield from self._gather(calls, fail, plan.deadline_s, late)

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        shared = ray.put(weights)
        calls = {n: (lambda actor, n=n: actor.evaluate.remote(n, round, shared, pictures)) for n in hospitals}
        yield from self._gather(calls, self._failure("evaluate", round, 0, left_host=False), None)

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        shared = ray.put(weights)
        if CENTRAL in plans:
            self._homes = [*self._homes, (CENTRAL,)]
        calls = {
            n: (lambda actor, n=n, plan=plan: actor.train_alone.remote(n, plan, shared)) for n, plan in plans.items()
        }
        yield from self._gather(calls, self._failure("train", 0, 0), None)

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        names = [name for home in self._homes for name in home]
        calls = {name: (lambda actor, name=name: actor.export_ledger.remote(name)) for name in names}
        answers = self._gather_named(calls, self._failure("evaluate", 0, 0, left_host=False), None)
        return {name: answer for name, answer in answers if isinstance(answer, dict)}

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()

    def _gather(
        self,
        calls: Mapping[str, Callable[[Any], Any]],
        fail: Callable[[str, str], ClientFailure],
        deadline_s: float | None,
        late: Callable[[str], ClientFailure] | None = None,
    ) -> Iterator[Any]:
        for _, answer in self._gather_named(calls, fail, deadline_s, late):
            yield answer

    def _gather_named(
        self,
        calls: Mapping[str, Callable[[Any], Any]],
        fail: Callable[[str, str], ClientFailure],
        deadline_s: float | None,
        late: Callable[[str], ClientFailure] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Run one call per hospital, one at a time per actor, and yield answers as they arrive."""
        queues = {home: [name for name in home if name in calls] for home in self._homes}
        ends = time.monotonic() + deadline_s if deadline_s is not None else None
        pending: dict[Any, tuple[tuple[str, ...], str]] = {}
        self._submit(queues, calls, pending)
        while pending:
            timeout = None if ends is None else max(0.0, ends - time.monotonic())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
            if not ready:
                break
            _, name = pending.pop(ready[0])
            yield name, self._take(ready[0], name, fail)
            self._submit(queues, calls, pending)
        missing = [name for _, name in pending.values()] + [name for queue in queues.values() for name in queue]
        for name in missing:
            yield name, late(name) if late is not None else fail(name, f"no answer within {deadline_s:g} s")

    def _submit(
        self,
        queues: dict[tuple[str, ...], list[str]],
        calls: Mapping[str, Callable[[Any], Any]],
        pending: dict[Any, tuple[tuple[str, ...], str]],
    ) -> None:
        busy = {home for home, _ in pending.values()}
        for home, queue in queues.items():
            if queue and home not in busy:
                name = queue.pop(0)
                pending[calls[name](self._actor(home))] = (home, name)

    def _take(self, reference: Any, name: str, fail: Callable[[str, str], ClientFailure]) -> Any:
        try:
            return ray.get(reference)
        except RayActorError:
            return fail(name, "the hospital's process ended before it answered; Ray restarts it for the next round")
        except RayTaskError as error:
            return fail(name, f"{type(error.cause).__name__} in the hospital's process; its own log has the details")
        except (GetTimeoutError, RayError) as error:
            return fail(name, f"Ray lost the hospital's answer ({type(error).__name__})")

    def _failure(
        self, stage: Stage, round: int, attempt: int, left_host: bool = True
    ) -> Callable[[str, str], ClientFailure]:
        def build(name: str, why: str) -> ClientFailure:
            return ClientFailure(
                hospital=name, round=round, attempt=attempt, stage=stage, reason=why, left_host=left_host
            )

        return build

    def _actor(self, home: tuple[str, ...]) -> Any:
        name = "+".join(home) if len(home) <= 2 else f"{home[0]}+{len(home) - 1}"
        if name not in self._actors:
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            options = actor_options(home, len(self._homes), resources, self._gpus_per_actor)
            remote = ray.remote(HospitalActor).options(name=f"hospital:{name}:{self._job}", **options)
            self._actors[name] = remote.remote([self._specs[hospital] for hospital in home])
        return self._actors[name]


def ledgers_to_pin(specs: Sequence[HospitalSpec]) -> list[str]:
    """Return the hospitals whose ledger outlives the run and so belongs to one node.

    The central baseline is among them: it opens every hospital's ledger, which only one node could have.
    """
    return [s.policy.hospital for s in specs if s.run.privacy.enable_dp and s.policy.declared != "synthetic"]


def deal(names: Sequence[str], num_actors: int | None) -> list[tuple[str, ...]]:
    """Deal hospitals to actors in turn; one actor each when no number is given."""
    count = min(num_actors or len(names), len(names))
    return [tuple(names[start::count]) for start in range(count)]


def actor_options(
    home: Sequence[str], num_actors: int, resources: Mapping[str, float], gpus_per_actor: float
) -> dict[str, Any]:
    """Return an actor's resources: its hospital's own node where the cluster names one, a GPU and a CPU share."""
    gpus = resources.get("GPU", 0.0)
    share = gpus_per_actor or (min(1.0, gpus / num_actors) if gpus else 0.0)
    pins = {f"hospital:{name}": 0.001 for name in home if f"hospital:{name}" in resources}
    return {
        "num_cpus": min(1.0, max(0.01, round(resources.get("CPU", 1.0) / (2 * num_actors), 2))),
        "num_gpus": share,
        "resources": pins or None,
        "max_restarts": -1,
        "max_task_retries": 0,
    }
