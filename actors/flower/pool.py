"""Hospitals behind Flower's SuperNodes, behind the same port as the in-process pool. This file imports no Flower.

The coordinator asks each node which hospital it is, then sends requests and looks for replies. A node that cannot be
reached, or answers what cannot be read, is a `ClientFailure`; a reply after the deadline is not taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from actors.flower.hospital import failure_of
from actors.flower.messages import HospitalReply, HospitalRequest, Identity, WireMessage, unpack
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, FederationError
from medfl_ray.federation.hospital_rules.failures import deadline_failure, evaluation_failure, start_failure
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.federation.round_clock import RoundClock
from medfl_ray.federation.studies.baselines import CENTRAL
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, PrivacySpent, RoundPlan, SiteEvaluation
from medfl_ray.params import Vector

POLL_S = 0.2
START_TIMEOUT_S = 600.0
Calls = Mapping[str, tuple[HospitalRequest, Vector | None]]
Late = Callable[[str], ClientFailure]


class Link(Protocol):
    """The way to the nodes; see GridLink in app.py."""

    def nodes(self) -> Sequence[int]:
        """Return the nodes that are connected."""

    def send(self, node: int, request: HospitalRequest, vector: Vector | None) -> str:
        """Send a request and return its number."""

    def receive(self, numbers: Sequence[str]) -> Mapping[str, WireMessage | str]:
        """Return the replies that are there, each a parcel or why there will be none."""


class FlowerPool:
    """The hospitals of a run as Flower nodes."""

    def __init__(
        self,
        link: Link,
        run: RunConfig,
        policies: Sequence[SitePolicy],
        job: str,
        expected_heads: Mapping[str, tuple[str, ...]],
        wait_s: float,
    ) -> None:
        """Take the run's hospitals; `describe` waits for all of them, `wait_s` at most.

        Raises:
          ConfigError: the run asks for what cannot be done over Flower.
        """
        check_flower_run(run)
        self._link, self._run, self._job, self._wait_s = link, run, job, wait_s
        self._index = {policy.hospital: number for number, policy in enumerate(policies)}
        self._keeps_accounts = any(policy.declared == "private" for policy in policies)
        self._heads = expected_heads
        self._nodes: dict[str, int] = {}
        self._clock = RoundClock()

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        failures = self._find_nodes()
        requests: Calls = {
            name: (self._request("describe", name, expected_heads=self._heads.get(name, ())), None)
            for name in self._index
            if name in self._nodes
        }
        answers: dict[str, Any] = failures | dict(self._ask(requests, HospitalInfo, _in(START_TIMEOUT_S)))
        return [answers[name] for name in self._index]

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        ends = self._clock.end(plan)
        if not plan.mechanisms and not self._keeps_accounts:
            return dict.fromkeys(plan.hospitals)  # nothing to write down: a message each would start a process each
        calls: Calls = {n: (self._request("reserve", n, plan=plan.addressed_to(n)), None) for n in plan.hospitals}
        answers: dict[str, Any] = dict(self._ask(calls, PrivacySpent, ends or _in(START_TIMEOUT_S)))
        return answers

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        if plan.mechanisms:
            calls: Calls = {
                n: (self._request("release", n, plan=plan.addressed_to(n), reason=reason), None) for n in hospitals
            }
            list(self._ask(calls, type(None), _in(plan.deadline_s or START_TIMEOUT_S)))

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Generator[ClientUpdate | ClientFailure, None, None]:
        calls: Calls = {n: (self._request("train", n, plan=plan.addressed_to(n)), weights) for n in hospitals}
        for _, answer in self._ask(calls, ClientUpdate, self._clock.end(plan), lambda n: deadline_failure(n, plan)):
            yield answer

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        calls: Calls = {n: (self._request("evaluate", n, round=round, pictures=pictures), weights) for n in hospitals}
        ends = None if deadline_s is None else _in(deadline_s)
        late = lambda n: evaluation_failure(n, round, "no evaluation within the deadline")  # noqa: E731
        for _, answer in self._ask(calls, SiteEvaluation, ends, late):
            yield answer

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        calls: Calls = {
            n: (self._request("alone", n, plans=p.rounds, returns_weights=p.returns_weights), weights)
            for n, p in plans.items()
        }
        for _, answer in self._ask(calls, AloneResult, None):
            yield answer

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        if not self._run.privacy.patient_level and not self._keeps_accounts:
            return {}
        calls: Calls = {name: (self._request("ledger", name), None) for name in self._nodes}
        answers = self._ask(calls, dict, _in(START_TIMEOUT_S))
        return {name: answer for name, answer in answers if isinstance(answer, dict)}

    def close(self) -> None:
        """End nothing: SuperNodes belong to the hospitals."""

    def _request(self, ask: Any, hospital: str, **fields: Any) -> HospitalRequest:
        common = {"index": self._index[hospital], "job": self._job, "config_hash": self._run.config_hash}
        return HospitalRequest(ask=ask, hospital=hospital, **common, **fields)

    def _find_nodes(self) -> dict[str, ClientFailure]:
        """Ask new nodes who they are until every hospital is found or time is up; return those that are not there."""
        ends = time.monotonic() + self._wait_s
        asked: dict[str, int] = {}
        owners: dict[int, str] = {}
        complaints: set[str] = set()
        while time.monotonic() < ends and set(owners.values()) < self._index.keys():
            for node in set(self._link.nodes()) - set(asked.values()):
                asked[self._link.send(node, HospitalRequest(ask="who"), None)] = node
            for number, reply in self._link.receive([n for n in asked if asked[n] not in owners]).items():
                said = _read(reply)
                owners[asked[number]] = said.hospital if isinstance(said, Identity) else ""
                complaints |= {said.reason} if isinstance(said, ClientFailure) else set()
            time.sleep(POLL_S)
        claims = {name: [node for node, owner in owners.items() if owner == name] for name in self._index}
        self._nodes = {name: nodes[0] for name, nodes in claims.items() if len(nodes) == 1}
        others = f"; of others: {'; '.join(sorted(complaints))}" if complaints else ""
        nobody = f"no SuperNode said within {self._wait_s:g} s that it is this hospital{others}"
        several = "several SuperNodes say that they are this hospital; stop all but its own"
        return {
            name: start_failure(name, several if nodes else nobody) for name, nodes in claims.items() if len(nodes) != 1
        }

    def _ask(
        self, calls: Calls, kind: type, ends: float | None, late: Late | None = None
    ) -> Generator[tuple[str, Any], None, None]:
        """Send requests and yield each hospital's answer as it arrives; what is no answer is a failure."""
        pending: dict[str, str] = {}
        for name, (request, vector) in calls.items():
            try:
                pending[self._link.send(self._nodes[name], request, vector)] = name
            except (FederationError, KeyError):
                yield name, failure_of(name, "its SuperNode is not connected", request)
        while pending and (ends is None or time.monotonic() < ends):
            for number, reply in self._link.receive(list(pending)).items():
                name = pending.pop(number)
                yield name, _checked(name, _read(reply), kind, calls[name][0])
            if pending:
                time.sleep(POLL_S)
        for name in pending.values():
            yield name, late(name) if late is not None else failure_of(name, "no answer in time", calls[name][0])


def check_flower_run(run: RunConfig) -> None:
    """Refuse what cannot be done over Flower.

    Raises:
      ConfigError: with the reason.
    """
    if CENTRAL in run.federation.baselines:
        raise ConfigError("federation.baselines: central pools all data in one process; over Flower there is none")
    if run.federation.stragglers == "keep":
        raise ConfigError(
            "federation.stragglers: keep is not done over Flower, where a reply after the deadline is not taken; "
            "leave it out"
        )


def _in(seconds: float) -> float:
    return time.monotonic() + seconds


def _read(reply: WireMessage | str) -> HospitalReply | str:
    """Return what a reply says, or why it says nothing."""
    if isinstance(reply, str):
        return reply
    try:
        return unpack(reply)
    except FederationError as error:
        return str(error)


def _checked(hospital: str, said: HospitalReply | str, kind: type, request: HospitalRequest) -> Any:
    """Return an answer of the kind that was asked for, of the hospital that was asked; else a failure."""
    if isinstance(said, str):
        return failure_of(hospital, said, request)
    fits = isinstance(said, (kind, ClientFailure)) or (said is None and kind is PrivacySpent)
    if not fits or getattr(said, "hospital", hospital) != hospital:
        return failure_of(hospital, "its SuperNode answered something else than what it was asked", request)
    return said
