"""All hospitals of a run in this process, one after the other: for tests, debugging and machines without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medfl_ray.errors import MedflError
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, PrivacySpent, RoundPlan, SiteEvaluation
from medfl_ray.params import Vector


class LocalPool:
    """Hospitals as plain objects; `builders` makes each one when the run starts."""

    def __init__(self, builders: Mapping[str, Callable[[], Hospital]]) -> None:
        self._builders = builders
        self._hospitals: dict[str, Hospital] = {}

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        answers: list[HospitalInfo | ClientFailure] = []
        for name in self._builders:
            if name == "central":
                continue
            try:
                answers.append(self._hospital(name).info())
            except MedflError as error:
                answers.append(start_failure(name, str(error)))
        return answers

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        return {name: self._hospital(name).reserve(plan) for name in plan.hospitals}

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        for name in hospitals:
            self._hospital(name).release(plan, reason)

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Iterator[ClientUpdate | ClientFailure]:
        started = time.monotonic()
        for name in hospitals:
            answer = self._hospital(name).train(plan, weights)
            late = plan.deadline_s is not None and time.monotonic() - started > plan.deadline_s
            yield deadline_failure(name, plan) if late else answer

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        for name in hospitals:
            yield self._hospital(name).evaluate(round, weights, pictures)

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        for name, plan in plans.items():
            try:
                hospital = self._hospital(name)
            except MedflError as error:
                yield start_failure(name, str(error))
                continue
            yield hospital.train_alone(plan, weights)

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        return {name: hospital.export_ledger() for name, hospital in self._hospitals.items()}

    def close(self) -> None:
        self._hospitals.clear()

    def _hospital(self, name: str) -> Hospital:
        if name not in self._hospitals:
            self._hospitals[name] = self._builders[name]()
        return self._hospitals[name]


def start_failure(hospital: str, reason: str) -> ClientFailure:
    """Say that a hospital could not start."""
    return ClientFailure(hospital=hospital, round=0, attempt=0, stage="start", reason=reason, left_host=False)


def deadline_failure(hospital: str, plan: RoundPlan) -> ClientFailure:
    """Say that a hospital's answer did not arrive in time; its privacy cost stays spent."""
    return ClientFailure(
        hospital=hospital,
        round=plan.round,
        attempt=plan.attempt,
        stage="train",
        reason=f"no update within deadline_s={plan.deadline_s:g}; the round closed without it and its cost stays spent",
    )
