"""One or several hospitals as the plain class that Ray turns into an actor.

This file imports no Ray: `ray.remote(HospitalActor)` is applied in ray_pool.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from actors.names import group_name
from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.errors import MedflError
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.hospital_rules.failures import start_failure
from medfl_ray.federation.hospital_rules.private_answers import shown_reason
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    HospitalInfo,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
)
from medfl_ray.params import Vector

T = TypeVar("T")


class HospitalActor:
    """One or several hospitals in a process of their own."""

    def __init__(self, specs: Sequence[HospitalSpec], num_threads: int = 1) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._specs = {spec.policy.hospital: spec for spec in specs}
        self._hospitals: dict[str, Hospital] = {}

    def __repr__(self) -> str:
        return f"HospitalActor({group_name(list(self._specs))})"

    def describe(self, hospital: str) -> HospitalInfo | ClientFailure:
        """Build a hospital and say what is public about it."""
        return self._asked(hospital, 0, 0, lambda built: built.info())

    def reserve(self, hospital: str, plan: RoundPlan) -> PrivacySpent | ClientFailure | None:
        """See Hospital.reserve."""
        return self._asked(hospital, plan.round, plan.attempt, lambda built: built.reserve(plan))

    def release(self, hospital: str, plan: RoundPlan, reason: str) -> None:
        """See Hospital.release."""
        self._hospital(hospital).release(plan, reason)

    def train(self, hospital: str, plan: RoundPlan, weights: Vector) -> ClientUpdate | ClientFailure:
        """See Hospital.train."""
        return self._asked(hospital, plan.round, plan.attempt, lambda built: built.train(plan, weights))

    def evaluate(self, hospital: str, round: int, weights: Vector, pictures: bool) -> SiteEvaluation | ClientFailure:
        """See Hospital.evaluate."""
        return self._asked(hospital, round, 0, lambda built: built.evaluate(round, weights, pictures))

    def train_alone(self, hospital: str, plan: AlonePlan, weights: Vector) -> AloneResult | ClientFailure:
        """See Hospital.train_alone."""
        return self._asked(hospital, 0, 0, lambda built: built.train_alone(plan, weights))

    def export_ledger(self, hospital: str) -> dict[str, Any]:
        """See Hospital.export_ledger."""
        return self._hospital(hospital).export_ledger()

    def close(self) -> None:
        """Leave nothing of the hospitals' images on the disk; see Hospital.close."""
        for hospital in self._hospitals.values():
            hospital.close()

    def process_id(self) -> int:
        """Return the actor's process id, for tools that watch or end it."""
        return os.getpid()

    def _asked(self, name: str, round: int, attempt: int, ask: Callable[[Hospital], T]) -> T | ClientFailure:
        """Ask a hospital, which is built first where this process is new: after a restart that may fail."""
        try:
            hospital = self._hospital(name)
        except MedflError as error:
            return start_failure(name, error, round, attempt)
        except Exception as error:  # noqa: BLE001 - whatever it is passes the gate
            return start_failure(name, shown_reason(self._specs[name].policy, error, "start"), round, attempt)
        return ask(hospital)

    def _hospital(self, name: str) -> Hospital:
        if name not in self._hospitals:
            self._hospitals[name] = build_hospital(self._specs[name])
        return self._hospitals[name]
