"""The rounds of several virtual hospitals side by side: the same pass of each trained as one group of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from actors.simulation.work import HospitalTurn
from medfl_ray.errors import ModelError
from medfl_ray.messages import ClientFailure
from medfl_ray.training.grouped.trainer import GroupedTrainer, HospitalTask
from medfl_ray.training.rules.client_rules import RuleResult, RuleSteps, TrainingPass
from medfl_ray.training.rules.local_job import LocalOutcome
from medfl_ray.training.rules.passes import advance, attempt
from medfl_ray.training.trainer import Trainer

log = structlog.get_logger()
Guard = Callable[[HospitalTurn, Callable[[], Any]], Any]
"""(hospital, work) to what the work returns, or to a ClientFailure of the hospital."""


@dataclass(frozen=True, eq=False)
class OngoingRound:
    """A hospital's round under way: its data, its passes, and the one that is trained next."""

    turn: HospitalTurn
    data: Any
    passes: RuleSteps
    following: TrainingPass


def finish_rounds(
    trainer: Trainer, many: GroupedTrainer, begun: Sequence[OngoingRound], guard: Guard, failures: list[ClientFailure]
) -> list[tuple[HospitalTurn, RuleResult]]:
    """Train pass after pass of all hospitals; whose pass fails is among the failures, and the others go on.

    All outcomes are there before any is used: one that is counted must not be trained again.
    """
    finished: list[tuple[HospitalTurn, RuleResult]] = []
    while begun:
        under_way: list[OngoingRound] = []
        for one, outcome in zip(begun, train_passes(trainer, many, begun, guard), strict=True):
            answer: Any = outcome
            if not isinstance(outcome, ClientFailure):
                answer = guard(one.turn, partial(advance, one.passes, outcome))
            if isinstance(answer, ClientFailure):
                failures.append(answer)
            elif isinstance(answer, RuleResult):
                finished.append((one.turn, answer))
            else:
                under_way.append(replace(one, following=answer))
        begun = under_way
    return finished


def train_passes(
    trainer: Trainer, many: GroupedTrainer, begun: Sequence[OngoingRound], guard: Guard
) -> list[LocalOutcome | ClientFailure]:
    """Train one pass of every hospital as a group; where that fails, in turn, so that a fault stays with its owner."""
    common = begun[0].following.start
    tasks = [
        HospitalTask(one.data, one.following.job, None if one.following.start is common else one.following.start)
        for one in begun
    ]
    try:
        found = dict(many.train(common, tasks))
    except Exception:
        log.exception("group_failed")
        return [guard(one.turn, partial(train_again, trainer, one)) for one in begun]
    return [found[position] for position in range(len(begun))]


def train_again(trainer: Trainer, one: OngoingRound) -> LocalOutcome:
    """Train a hospital alone whose group failed.

    Raises:
      ModelError: its training is private; a second one would draw other noise over the same patients, for which
        nobody has paid.
    """
    if one.following.job.mechanism is not None:
        raise ModelError("its group could not be trained; the charge stays")
    return attempt(trainer, one.following, one.data)
