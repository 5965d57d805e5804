"""Many hospitals in one process, for simulations: the plain class that Ray turns into one actor per core.

A hospital is a name here until its turn comes. Its data are opened then, and trained beside others as groups of one
network where that is faster; what goes back is one sum over all of them and a few figures of each.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog

from actors.simulation.open_hospitals import OpenHospitals
from actors.simulation.shared import Fetched, Shared
from actors.simulation.work import (
    Assignment,
    AssignmentResult,
    EvaluationJob,
    HospitalTurn,
    Memories,
    OpenData,
    TimedData,
    VirtualData,
)
from medfl_ray.aggregation.fixed_point import PartialSum, add_updates, empty_sum
from medfl_ray.assembly.hospital import configure_logs, make_pictures
from medfl_ray.assembly.run import initial_weights
from medfl_ray.config.base import DataKind
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import MedflError, UpdateRejected
from medfl_ray.federation.hospital_rules.failures import start_failure
from medfl_ray.federation.hospital_rules.labels import labelled
from medfl_ray.federation.ports import SummedUpdates, TrainedHospital
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, SiteEvaluation
from medfl_ray.params import Layout, Vector
from medfl_ray.privacy.hospital_level import clip_update

if TYPE_CHECKING:
    from actors.simulation.training import OngoingRound
    from medfl_ray.training.grouped.trainer import GroupedTrainer
    from medfl_ray.training.rules.local_job import LocalOutcome
    from medfl_ray.training.rules.passes import LocalRules
    from medfl_ray.training.scoring.evaluation import PatientScore
    from medfl_ray.training.trainer import Trainer

T = TypeVar("T")
log = structlog.get_logger()
NOTHING = Memories()
SCORED_AT_ONCE = 16
SCREENED = {"stage": "screen"}


class VirtualHospitals:
    """The hospitals that come to one process: they share its network, one at a time or in groups."""

    def __init__(
        self,
        run: RunConfig,
        declared: DataKind,
        open_data: OpenData | None = None,
        gpu_share: float = 0.0,
        cache_bytes: int | None = None,
        looks_ahead: bool = False,
        memories: Memories = NOTHING,
    ) -> None:
        """Import what training needs, so that it is there when the first hospitals come.

        Args:
          declared: the strictest declaration among the hospitals' data; all figures are labelled by it.
          gpu_share: share of the GPU's memory that this process may take.
          cache_bytes: most memory for the hospitals' prepared images, None for no limit.
          memories: where hospitals keep what they remember.
          looks_ahead: whether the next group's images are prepared, in a thread, while a group trains.
        """
        import torch

        import medfl_ray.training.grouped.trainer  # noqa: F401 - loaded while the coordinator prepares the run
        from medfl_ray.models.light_monai import load_monai

        load_monai()
        torch.set_num_threads(1)
        configure_logs()
        if 0 < gpu_share < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(gpu_share)
        self._run = run
        self._declared = declared
        self._data = OpenHospitals(run, open_data, cache_bytes, looks_ahead)
        self._trainer: Trainer | None = None
        self._rules: LocalRules | None = None
        self._memories = memories
        self._many: GroupedTrainer | None = None
        self._fetched = Fetched()
        self._group_reason, self._seconds = "", {"data": 0.0, "sum": 0.0, "train": 0.0}

    def process_id(self) -> int:
        """Return the process's id, for tools that watch or end it."""
        return os.getpid()

    def prepare(self, hospital: str) -> None:
        """Build the network that all hospitals have, from the data of one; what is wrong with them, `describe` says."""
        with suppress(MedflError):
            self._trainer_for(self._opened(hospital))
        gc.freeze()  # a full collection would walk through every library that is loaded, in the middle of a round

    def first_weights(self, in_channels: int, out_channels: int) -> tuple[Layout, Vector] | MedflError:
        """Return layout and first weights [P] of the run's network, or why there are none."""
        try:
            return initial_weights(self._run)(in_channels, out_channels)
        except MedflError as error:
            return error

    def describe(self, hospital: str, policy: SitePolicy) -> HospitalInfo | ClientFailure:
        """Open one hospital and say what is public about it; the others of the run have the same network."""
        try:
            data = self._opened(hospital)
            trainer = self._trainer_for(data)
            if self._run.privacy.patient_level:
                trainer.group_size()  # refuses a network that mixes patients before anything is charged
            many = self._many_hospitals()
        except MedflError as error:
            return start_failure(hospital, error)
        return HospitalInfo(
            hospital=hospital,
            declared=policy.declared,
            data_set=policy.data_set,
            num_patients=policy.num_patients,
            num_channels=len(data.channels),
            labels=dict(data.labels),
            layout_checksum=trainer.layout.checksum,
            device=str(trainer.device),
            patient_group_size=trainer.group_size() if self._run.privacy.patient_level else None,
            hospitals_per_group=many.group_size,
        )

    def group_size_reason(self) -> str:
        """Say how many hospitals are trained at once and why, in a sentence."""
        return self._group_reason

    def train(self, assignment: Assignment, weights: Vector | Shared) -> AssignmentResult:
        """Train the groups one after the other from the same weights."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        started, weights = time.perf_counter(), self._fetched(weights)
        updates: list[ClientUpdate] = []
        failures: list[ClientFailure] = []
        trained: list[TrainedHospital] = []
        total: PartialSum | None = None
        for group, following in zip(assignment.groups, [*assignment.groups[1:], ()], strict=True):
            self._data.prepare_ahead([turn.hospital for turn in following])
            done = self._train_group(assignment, group, weights, failures)
            if assignment.streamed:
                updates += [self._update(assignment, turn, outcome) for turn, outcome in done]
            elif done:
                total, added = self._add(assignment, total or empty_sum(done[0][1].delta.size), done, failures)
                trained += added
        summed = None
        if trained and total is not None:
            checksum = self._layout_checksum()
            summed = SummedUpdates(assignment.round, assignment.attempt, checksum, total, tuple(trained))
        self._seconds["train"] = time.perf_counter() - started - self._seconds["data"] - self._seconds["sum"]
        return AssignmentResult(summed, tuple(updates), tuple(failures), self._seconds)

    def evaluate(self, scoring: EvaluationJob, weights: Vector | Shared) -> list[SiteEvaluation | ClientFailure]:
        """Score the weights on the held-out patients of hospitals, a few hospitals' images in one pass."""
        weights, answers = self._fetched(weights), list[SiteEvaluation | ClientFailure]()
        where = Assignment(scoring.round, 0, 0.0, None, False, 1, ())
        for start in range(0, len(scoring.hospitals), SCORED_AT_ONCE):
            some = scoring.hospitals[start : start + SCORED_AT_ONCE]
            together = self._score_together(some, weights)
            for position, hospital in enumerate(some, start):
                pictured = position < scoring.num_pictures
                work = partial(self._evaluate, scoring.round, hospital, weights, pictured, together.get(hospital))
                answer = self._guarded(where, HospitalTurn(hospital, 0, 0, 0), work)
                if isinstance(answer, ClientFailure):
                    answer = answer.model_copy(update={"stage": "evaluate", "may_have_left": False})
                answers.append(answer)
        return answers

    def _score_together(self, hospitals: Sequence[str], weights: Vector) -> dict[str, list[PatientScore]]:
        """Score hospitals at once; none where one of them is at fault, whose own turn then says so."""
        if self._run.federation.exact:
            return {}
        try:
            data = [self._opened(hospital) for hospital in hospitals]
            scores = self._trainer_for(data[0]).evaluate_together(weights, data)
        except Exception:
            log.exception("scoring_together_failed")
            return {}
        return dict(zip(hospitals, scores, strict=True))

    def _evaluate(
        self, round: int, hospital: str, weights: Vector, with_pictures: bool, scores: list[PatientScore] | None
    ) -> SiteEvaluation:
        from medfl_ray.training.scoring.evaluation import headline_of_shared, summarise

        data = self._opened(hospital)
        trainer = self._trainer_for(data)
        if scores is None:
            scores = trainer.evaluate(weights, data)
        values = summarise(scores)
        if self._run.aggregation.is_personal:
            assert self._rules is not None
            own = self._rules.evaluated(self._memories.before(round + 1, hospital), weights)
            if own is not weights:
                scores, weights = trainer.evaluate(own, data), own
            values = summarise(scores) | headline_of_shared(values)
        may_show = self._declared != "private"
        return SiteEvaluation(
            hospital=hospital,
            round=round,
            metrics=labelled(values, self._declared, self._run.privacy.enable_dp),
            patient_scores=tuple(score.headline for score in scores) if may_show else None,
            pictures=make_pictures(trainer, weights, data) if with_pictures and may_show else (),
        )

    def _train_group(
        self, assignment: Assignment, group: Sequence[HospitalTurn], weights: Vector, failures: list[ClientFailure]
    ) -> list[tuple[HospitalTurn, LocalOutcome]]:
        """Train one group's round by the strategy's rule, from what each hospital remembers, and remember what came."""
        from actors.simulation.training import finish_rounds

        guard = partial(self._guarded, assignment)
        begun: list[OngoingRound] = []
        for turn in group:
            answer = guard(turn, partial(self._begin, assignment, turn, weights))
            if isinstance(answer, ClientFailure):
                failures.append(answer)
            else:
                begun.append(answer)
        if not begun:
            return []
        assert self._trainer is not None
        many = self._many_hospitals(assignment.group_size)
        outcomes: list[tuple[HospitalTurn, LocalOutcome]] = []
        for turn, done in finish_rounds(self._trainer, many, begun, guard, failures):
            problem = guard(turn, partial(self._memories.save, assignment.round, turn.hospital, done.memory))
            if problem is None:
                outcomes.append((turn, done.outcome))
            else:
                failures.append(problem)
        return outcomes

    def _begin(self, assignment: Assignment, turn: HospitalTurn, weights: Vector) -> OngoingRound:
        from actors.simulation.training import OngoingRound
        from medfl_ray.training.rules.local_job import LocalJob
        from medfl_ray.training.rules.passes import first_pass

        data = self._opened(turn.hospital)
        self._trainer_for(data)
        assert self._rules is not None
        seed_key = (abs(self._run.federation.seed), assignment.round, turn.index)
        job = LocalJob(turn.num_steps, assignment.learning_rate, turn.mechanism, seed_key)
        timed, known = TimedData(data, self._seconds), self._memories.before(assignment.round, turn.hospital)
        passes = self._rules.begin(weights, known, timed, job, turn.index, plainly=assignment.round == 0)
        return OngoingRound(turn, timed, passes, first_pass(passes))

    def _add(
        self,
        assignment: Assignment,
        total: PartialSum,
        done: Sequence[tuple[HospitalTurn, LocalOutcome]],
        failures: list[ClientFailure],
    ) -> tuple[PartialSum, list[TrainedHospital]]:
        """Add a group's updates to the sum; one that cannot be added is refused with its reason."""
        started = time.perf_counter()
        added: list[tuple[HospitalTurn, LocalOutcome]] = []
        try:
            total = self._with(total, done)
            added += done
        except UpdateRejected:
            for one in done:
                try:
                    total = self._with(total, [one])
                    added.append(one)
                except UpdateRejected as error:
                    failures.append(self._failure(assignment, one[0], str(error)).model_copy(update=SCREENED))
        self._seconds["sum"] += time.perf_counter() - started
        return total, [TrainedHospital(turn.hospital, out.num_steps, self._metrics(out)) for turn, out in added]

    def _with(self, total: PartialSum, done: Sequence[tuple[HospitalTurn, LocalOutcome]]) -> PartialSum:
        if not done:
            return total
        weights = [turn.weight for turn, _ in done]
        return add_updates(total, np.stack([outcome.delta for _, outcome in done]), weights)

    def _update(self, assignment: Assignment, turn: HospitalTurn, outcome: LocalOutcome) -> ClientUpdate:
        delta, within = outcome.delta, None
        if assignment.clip_norm is not None:
            delta, within = clip_update(delta, assignment.clip_norm)
        return ClientUpdate(
            hospital=turn.hospital,
            round=assignment.round,
            attempt=assignment.attempt,
            delta=delta,
            layout_checksum=self._layout_checksum(),
            aggregation_weight=turn.weight,
            num_steps=outcome.num_steps,
            spent=None,
            metrics={} if assignment.clip_norm is not None else self._metrics(outcome),
            within_clip=within,
        )

    def _metrics(self, outcome: LocalOutcome) -> dict[str, Any]:
        return labelled({"train_loss": outcome.mean_loss}, self._declared, self._run.privacy.enable_dp)

    def _opened(self, hospital: str) -> Any:
        """Return a hospital's data; the time that opening them takes is counted as that of data."""
        started = time.perf_counter()
        data = self._data.opened(hospital)
        self._seconds["data"] += time.perf_counter() - started
        return data

    def _trainer_for(self, data: VirtualData) -> Trainer:
        """Return the one trainer of this process; the first hospital's data say how many channels there are."""
        if self._trainer is None:
            from medfl_ray.training.rules.passes import LocalRules
            from medfl_ray.training.trainer import Trainer

            run = self._run
            trainer = Trainer(
                model=run.model,
                training=run.training,
                task=run.data.task,
                spatial_dims=run.spatial_dims,
                in_channels=run.model.in_channels or len(data.channels),
                out_channels=run.model.out_channels or max(data.labels, default=1) + 1,
                patch_size=run.patch_size,
                for_dp=run.privacy.patient_level,
                exact=run.federation.exact,
            )
            self._rules = LocalRules(trainer, run.aggregation)
            self._trainer = trainer
        return self._trainer

    def _many_hospitals(self, group_size: int | None = None) -> GroupedTrainer:
        """Return what trains groups of a size, the size measured here where none is given."""
        from medfl_ray.training.grouped.hospital_groups import explain_hospitals_per_group
        from medfl_ray.training.grouped.trainer import GroupedTrainer

        assert self._trainer is not None
        if self._many is None:
            if self._run.federation.exact:
                group_size, self._group_reason = 1, "Hospitals are trained one after the other: federation.exact is on."
            elif group_size is None:
                choice = explain_hospitals_per_group(self._trainer)
                group_size, self._group_reason = choice.size, choice.reason
            self._many = GroupedTrainer(self._trainer, group_size)
        return self._many

    def _layout_checksum(self) -> str:
        assert self._trainer is not None
        return self._trainer.layout.checksum

    def _guarded(self, where: Assignment, turn: HospitalTurn, work: Callable[[], T]) -> T | ClientFailure:
        """Turn whatever goes wrong at one hospital into a failure with a reason."""
        try:
            return work()
        except MedflError as error:
            return self._failure(where, turn, str(error))
        except Exception as error:
            log.exception("hospital_failed", hospital=turn.hospital, round=where.round)
            kind = type(error).__name__
            return self._failure(where, turn, f"{kind} in the hospital's process; its own log has the details")

    @staticmethod
    def _failure(where: Assignment, turn: HospitalTurn, reason: str) -> ClientFailure:
        return ClientFailure(
            hospital=turn.hospital, round=where.round, attempt=where.attempt, stage="train", reason=reason
        )
