"""All hospitals of a run in this process, one after the other: for tests, debugging and machines without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from medfl_ray.errors import MedflError
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.hospital_rules.failures import deadline_failure, evaluation_failure, start_failure
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.federation.round_clock import RoundClock
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, PrivacySpent, RoundPlan, SiteEvaluation
from medfl_ray.params import Vector

T = TypeVar("T")


class LocalPool:
    """Hospitals as plain objects; `builders` makes each one when the run starts.

    With `keeps_late`, an update that misses its deadline is yielded in the next round.
    """

    def __init__(
        self,
        builders: Mapping[str, Callable[[], Hospital]],
        keeps_late: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._builders = builders
        self._keeps_late = keeps_late
        self._hospitals: dict[str, Hospital] = {}
        self._time, self._clock = clock, RoundClock(clock)
        self._late: list[ClientUpdate] = []

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        return [self._asked(name, 0, 0, lambda built: built.info()) for name in self._builders if name != "central"]

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        self._clock.begin(plan)
        return {name: self._tell(name, plan, lambda built, own: built.reserve(own)) for name in plan.hospitals}

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        for name in hospitals:
            self._asked(
                name, plan.round, plan.attempt, lambda built: built.release(plan.addressed_to(built.id), reason)
            )

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Generator[ClientUpdate | ClientFailure, None, None]:
        late, self._late = self._late, []
        yield from late
        for name in hospitals:
            answer = self._tell(name, plan, lambda built, own: built.train(own, weights))
            if self._clock.is_late(plan):
                if self._keeps_late and isinstance(answer, ClientUpdate):
                    self._late.append(answer)
                yield deadline_failure(name, plan)
            else:
                yield answer

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        started = self._time()
        for name in hospitals:
            if deadline_s is not None and self._time() - started > deadline_s:
                yield evaluation_failure(name, round, f"not begun within deadline_s={deadline_s:g}")
            else:
                yield self._asked(name, round, 0, lambda built: built.evaluate(round, weights, pictures))

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        for name, plan in plans.items():
            yield self._asked(name, 0, 0, partial(Hospital.train_alone, plan=plan, weights=weights))

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        return {name: hospital.export_ledger() for name, hospital in self._hospitals.items()}

    def close(self) -> None:
        for hospital in self._hospitals.values():
            hospital.close()
        self._hospitals.clear()

    def _tell(self, name: str, plan: RoundPlan, ask: Callable[[Hospital, RoundPlan], T]) -> T | ClientFailure:
        """Ask a hospital about the part of a plan that concerns it."""
        own = plan.addressed_to(name)
        return self._asked(name, plan.round, plan.attempt, lambda built: ask(built, own))

    def _asked(self, name: str, round: int, attempt: int, ask: Callable[[Hospital], T]) -> T | ClientFailure:
        """Ask a hospital, which is built first where it is not there yet."""
        if name not in self._hospitals:
            try:
                self._hospitals[name] = self._builders[name]()
            except MedflError as error:
                return start_failure(name, error, round, attempt)
        return ask(self._hospitals[name])
