"""Virtual hospitals on a few Ray actors, behind the same port as hospitals with an actor each.

Groups are formed from the sorted cohort before anything is dealt, the largest first, and every sum is of integers:
which actor trains which group, and how many actors there are, changes no bit of the result.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from actors.cluster import simulation_environment
from actors.names import actor_name
from actors.placement import plan_simulation_actors
from actors.simulation.dealer import TRIES, Dealer, WorkLost
from actors.simulation.hospitals import VirtualHospitals
from actors.simulation.shared import Shared
from actors.simulation.work import Assignment, AssignmentResult, EvaluationJob, HospitalTurn, Memories, OpenData
from medfl_ray.config.base import DataKind
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, FederationError, MedflError, PrivacyError
from medfl_ray.federation.hospital_rules.failures import deadline_failure, start_failure
from medfl_ray.federation.planning import aggregation_weight, check_limits, check_terms
from medfl_ray.federation.ports import AlonePlan, AloneResult, SummedUpdates, TrainingAnswer
from medfl_ray.federation.round_clock import RoundClock
from medfl_ray.messages import (
    ClientFailure,
    HospitalInfo,
    Mechanism,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
)
from medfl_ray.params import Layout, Vector
from medfl_ray.store.ledger.simulated import SimulatedLedgers
from medfl_ray.training.grouped.group_forming import cut_into_pieces, form_groups, group_cost

PICTURED_HOSPITALS = 2
CACHED_SHARE = 0.5
NOTHING = Memories()
STRICTEST: tuple[DataKind, ...] = ("private", "public", "synthetic")


class VirtualPool:
    """A pool for simulations: hospitals are names, and a handful of actors train whoever is asked."""

    def __init__(
        self,
        run: RunConfig,
        policies: Sequence[SitePolicy],
        open_ledgers: Callable[[], SimulatedLedgers] | None = None,
        open_data: OpenData | None = None,
        name: str = "simulation",
        memories: Memories = NOTHING,
    ) -> None:
        """Start the actors; they load their libraries while the caller goes on.

        Args:
          name: of the run, in its actors' names.
          memories: where hospitals keep what they remember of the run, if its strategy has them remember anything.
          open_ledgers: opens the hospitals' accounts when the first is needed; None without patient-level DP.

        Raises:
          ConfigError: the run asks for what virtual hospitals cannot do.
        """
        check_simulation(run, policies)
        check_memories(run, memories)
        self._clock = RoundClock()
        self._memories = memories
        self._run = run
        self._policies = {policy.hospital: policy for policy in policies}
        self._index = {policy.hospital: index for index, policy in enumerate(policies)}
        self._open_ledgers = open_ledgers
        self._ledgers: SimulatedLedgers | None = None
        self._reserved: dict[str, tuple[str, Mechanism]] = {}
        self._group_size = 1
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        declared = min((policy.declared for policy in policies), key=STRICTEST.index)
        self._actors = start_actors(run, declared, open_data, len(policies), name, memories)
        self._dealer = Dealer(self._actors)

    @property
    def num_actors(self) -> int:
        """How many processes share the hospitals."""
        return len(self._actors)

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        """Let the first hospital's data say what network the run has; the others are taken at their policies' word."""
        first = next(iter(self._policies))
        # All at once, and before the group size is measured; an actor that fails here says so when it is asked to work.
        prepared = [actor.prepare.remote(first) for actor in self._actors]
        ray.wait(prepared, num_returns=len(prepared))
        try:
            answer = ray.get(self._actors[0].describe.remote(first, self._policies[first]))
        except RayError as error:
            answer = start_failure(first, f"the first hospital could not be opened ({type(error).__name__})")
        if isinstance(answer, ClientFailure):
            return [answer.model_copy(update={"hospital": name}) for name in self._policies]
        self._group_size = answer.hospitals_per_group or 1
        self.notes.append(f"note: {ray.get(self._actors[0].group_size_reason.remote())}")
        return [answer.model_copy(update=_public(policy)) for policy in self._policies.values()]

    def first_weights(self, in_channels: int, out_channels: int) -> tuple[Layout, Vector]:
        """Return layout and first weights [P], built in an actor: this process needs no PyTorch.

        Raises:
          MedflError: as building them raises; FederationError where the actor died.
        """
        try:
            answer = ray.get(self._actors[0].first_weights.remote(in_channels, out_channels))
        except RayError as error:
            raise FederationError(f"the network could not be built ({type(error).__name__} in its process)") from None
        if isinstance(answer, MedflError):
            raise answer
        layout, weights = answer
        return layout, weights

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        """Charge the whole cohort in one durable write; what an earlier attempt at the round has left is forgotten."""
        self._clock.begin(plan)
        if self._run.aggregation.is_stateful:
            for name in plan.hospitals:
                self._memories.forget_from(plan.round, name)
        if not plan.mechanisms:
            return dict.fromkeys(plan.hospitals)
        answers: dict[str, PrivacySpent | ClientFailure | None] = {}
        wanted: dict[str, Mechanism] = {}
        for name in plan.hospitals:
            problem = self._refusal(plan, name)
            if problem is None:
                wanted[name] = plan.mechanisms[name]
            else:
                answers[name] = _failure(plan, name, "reserve", problem)
        budget = self._run.privacy.epsilon
        reserved: Mapping[str, str | PrivacyError]
        try:
            reserved = self._accounts().reserve((plan.job, plan.round, plan.attempt), wanted, budget, plan.ledger_heads)
        except PrivacyError as error:
            reserved = dict.fromkeys(wanted, error)
        charged = {name: answer for name, answer in reserved.items() if isinstance(answer, str)}
        self._reserved = {name: (reservation, wanted[name]) for name, reservation in charged.items()}
        answers |= {
            name: _failure(plan, name, "reserve", str(error))
            for name, error in reserved.items()
            if isinstance(error, PrivacyError)
        }
        return answers | self._spent(list(charged), plan.ledger_heads)

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        """Give back reservations of hospitals that never started to train."""
        own = {name: self._reserved.pop(name)[0] for name in hospitals if name in self._reserved}
        if own:
            self._accounts().release(own, reason)

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Generator[TrainingAnswer, None, None]:
        """Yield one sum per finished assignment, and each failure; settled before anything is trained."""
        started = time.perf_counter()
        self.seconds = dict.fromkeys(("train", "data", "sum"), 0.0)
        spent: dict[str, PrivacySpent] = {}
        if plan.mechanisms:
            unreserved = [name for name in hospitals if self._reserved.get(name, ("", None))[1] is None]
            yield from (_failure(plan, name, "train", "no reservation is open for this round") for name in unreserved)
            hospitals = [name for name in hospitals if name in self._reserved]
            self._accounts().settle({name: self._reserved.pop(name)[0] for name in hospitals})
            spent = self._spent(hospitals, plan.ledger_heads)
        for finished in self._run_assignments(plan, self._assignments(plan, hospitals), Shared(ray.put(weights))):
            for name, seconds in finished.seconds.items():
                self.seconds[name] += seconds
            yield from finished.failures
            yield from (replace(update, spent=spent.get(update.hospital)) for update in finished.updates)
            if finished.total is not None:
                yield with_spent(finished.total, spent) if spent else finished.total
        self.seconds["wall"] = time.perf_counter() - started

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        """Yield the evaluation of every hospital asked."""
        started = time.perf_counter()
        shared = Shared(ray.put(weights))
        pictured = PICTURED_HOSPITALS if pictures else 0
        pieces = [tuple(hospitals[start::8]) for start in range(min(8, len(hospitals)))]
        scorings = [EvaluationJob(round, piece, 0 if number else pictured) for number, piece in enumerate(pieces)]
        for scoring, answers in self._dealer.deal("evaluate", scorings, shared, timeout_s=deadline_s):
            if not isinstance(answers, WorkLost):
                yield from answers
                continue
            for name in scoring.hospitals:
                yield ClientFailure(
                    hospital=name, round=round, attempt=0, stage="evaluate", reason=answers.reason, may_have_left=False
                )
        self.seconds["evaluate"] = time.perf_counter() - started

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        """Not reached: `check_simulation` refuses baselines."""
        raise ConfigError("federation.baselines are not trained with virtual hospitals; use --pool ray or local")

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        """Return each account that was charged, as plain data."""
        return {} if self._open_ledgers is None else self._accounts().export(list(self._policies))

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    def _accounts(self) -> SimulatedLedgers:
        if self._ledgers is None:
            assert self._open_ledgers is not None
            self._ledgers = self._open_ledgers()
        return self._ledgers

    def _spent(self, hospitals: Sequence[str], heads: Mapping[str, str]) -> dict[str, PrivacySpent]:
        return self._accounts().spent(hospitals, heads)

    def _refusal(self, plan: RoundPlan, name: str) -> str | None:
        mechanism, policy = plan.mechanisms.get(name), self._policies[name]
        if mechanism is None:
            return f"the plan of round {plan.round} has no privacy mechanism for {name!r}"
        if (mechanism.num_records, mechanism.num_steps) != (policy.num_patients, plan.num_steps[name]):
            return f"the mechanism of {name!r} is of other patients or steps than its policy and plan say"
        try:
            check_terms(self._run, policy, mechanism)
            check_limits(policy, self._run.data.task, plan.num_steps[name], mechanism)
        except PrivacyError as error:
            return str(error)
        return None

    def _assignments(self, plan: RoundPlan, hospitals: Sequence[str]) -> list[Assignment]:
        """Form groups of hospitals of about one size and deal them into assignments, the most work first."""
        turns = [
            HospitalTurn(
                name,
                self._index[name],
                aggregation_weight(self._run, self._policies[name]),
                plan.num_steps[name],
                plan.mechanisms.get(name),
            )
            for name in sorted(hospitals)
        ]
        size = self._group_size
        sizes = [(turn.num_steps, self._policies[turn.hospital].num_patients) for turn in turns]
        batch = self._run.training.batch_size

        def cost(group: Sequence[int]) -> float:
            return group_cost(sizes[group[-1]], len(group), batch)

        formed = sorted(form_groups(sizes, size, batch), key=cost, reverse=True)
        groups = [tuple(turns[position] for position in group) for group in formed]
        streamed = plan.clip_norm is not None or self._run.needs_every_update
        # Where work may be lost with its process, or late, pieces are small.
        evenly = streamed or bool(plan.mechanisms) or plan.deadline_s is not None or plan.enough is not None
        common = (plan.round, plan.attempt, plan.learning_rate, plan.clip_norm, streamed, size)
        pieces = cut_into_pieces([cost(group) for group in formed], len(self._actors), evenly)
        return [Assignment(*common, tuple(groups[start:end])) for start, end in pieces]

    def _run_assignments(
        self, plan: RoundPlan, assignments: Sequence[Assignment], weights: Any
    ) -> Iterator[AssignmentResult]:
        """Have them trained; without noise a second training gives the same bits, with noise nobody paid for it."""
        tries = 1 if plan.mechanisms else TRIES
        for assignment, result in self._dealer.deal(
            "train", assignments, weights, tries=tries, timeout_s=self._clock.seconds_left(plan), apart=Assignment.apart
        ):
            if not isinstance(result, WorkLost):
                yield result
            elif result.late:
                yield AssignmentResult(
                    None, (), tuple(deadline_failure(name, plan) for name in assignment.hospitals), {}
                )
            else:
                failures = tuple(_failure(plan, name, "train", result.reason) for name in assignment.hospitals)
                yield AssignmentResult(None, (), failures, {})


def check_simulation(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    """Refuse what virtual hospitals cannot do.

    Raises:
      ConfigError: the run has baselines, or patient-level DP over data that are not synthetic.
    """
    if run.federation.baselines:
        raise ConfigError("federation.baselines are not trained with virtual hospitals; use --pool ray or local")
    private = [policy.hospital for policy in policies if policy.declared == "private"]
    if private:
        raise ConfigError(
            f"hospital {private[0]!r} has private data, and a simulation keeps no account of what leaves them; use "
            "--pool ray or local"
        )
    real = [policy.hospital for policy in policies if policy.declared != "synthetic"]
    if run.privacy.patient_level and real:
        raise ConfigError(
            f"hospital {real[0]!r} has data that are not synthetic, whose privacy account outlives the run and belongs "
            "to the hospital's own process; use --pool ray, or switch privacy.enable_dp off"
        )


def check_memories(run: RunConfig, memories: Memories) -> None:
    """Refuse hospitals that remember something and could come back to a process that cannot read it.

    Raises:
      ConfigError: the cluster has several nodes, or there is no folder at all.
    """
    if not run.aggregation.is_stateful:
        return
    num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    if memories.folder is None or num_nodes > 1:
        raise ConfigError(
            f"aggregation.strategy {run.aggregation.strategy!r} has every hospital remember something, which virtual "
            "hospitals keep in the run's folder on one node; use --pool ray, or a cluster of one node"
        )


def start_actors(
    run: RunConfig,
    declared: DataKind,
    open_data: OpenData | None,
    num_hospitals: int,
    name: str,
    memories: Memories = NOTHING,
) -> list[Any]:
    """Start one actor per core, or as many as the run asks for; on GPUs each gets its share and no more memory."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    crew = plan_simulation_actors(nodes, num_hospitals, run.federation.num_actors, run.training.gpus_per_hospital)
    count, cores = crew.num_actors, sum(node.get("CPU", 0.0) for node in nodes)
    remote = ray.remote(VirtualHospitals)
    options = {
        "num_cpus": crew.num_cpus,
        "num_gpus": crew.num_gpus,
        "max_restarts": -1,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": simulation_environment()},
    }
    cache_bytes = cache_of_each(run, count, sum(node.get("memory", 0.0) for node in nodes) or None)
    # On a core of its own a thread that prepares images would only take turns with the training.
    looks_ahead = crew.num_gpus > 0 or cores >= 2 * count
    # Several simulations of one name may go on at once, as in a search.
    names = [actor_name(name, "virtual", f"{number}-{secrets.token_hex(3)}") for number in range(1, count + 1)]
    arguments = (run, declared, open_data, crew.num_gpus, cache_bytes, looks_ahead, memories)
    return [remote.options(name=named, **options).remote(*arguments) for named in names]


def cache_of_each(run: RunConfig, num_actors: int, memory_bytes: float | None) -> int | None:
    """Return the bytes that one actor's prepared images may take: data.cache_mb, or its part of half the memory."""
    if run.data.cache_mb is not None:
        return run.data.cache_mb * 2**20
    return None if memory_bytes is None else int(memory_bytes * CACHED_SHARE / num_actors)


def with_spent(total: SummedUpdates, spent: Mapping[str, PrivacySpent]) -> SummedUpdates:
    """Return a sum that says what each of its hospitals has spent."""
    return replace(total, trained=tuple(replace(one, spent=spent.get(one.hospital)) for one in total.trained))


def _public(policy: SitePolicy) -> dict[str, Any]:
    return {
        "hospital": policy.hospital,
        "declared": policy.declared,
        "data_set": policy.data_set,
        "num_patients": policy.num_patients,
    }


def _failure(plan: RoundPlan, name: str, stage: Any, reason: str) -> ClientFailure:
    return ClientFailure(
        hospital=name,
        round=plan.round,
        attempt=plan.attempt,
        stage=stage,
        reason=reason,
        may_have_left=stage == "train",
    )
