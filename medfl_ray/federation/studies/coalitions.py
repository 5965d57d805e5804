"""Federations of some of a run's hospitals: the run's own rounds with fewer hospitals, kept in no folder.

Each round is reserved and charged like one of the run, under a job of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from medfl_ray.aggregation.strategies import released_weights
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import FederationError
from medfl_ray.federation.policies import RunHistory
from medfl_ray.federation.ports import FederationState
from medfl_ray.federation.round_context import RoundContext
from medfl_ray.federation.rounds import run_round
from medfl_ray.federation.selection import select_of_run
from medfl_ray.messages import LedgerRows, RoundPlan, RoundResult, SiteEvaluation
from medfl_ray.params import Vector
from medfl_ray.study_records import CoalitionRecord

TrainCoalitions = Callable[[RoundContext, Vector, Sequence[tuple[str, ...]]], Iterator[CoalitionRecord]]
"""Yields a record for each coalition, in any order; FederationError where one cannot be trained."""


class NoKeeper:
    """Keeps nothing: a coalition that is interrupted is trained again from its start."""

    def open_round(self, plan: RoundPlan) -> None: ...
    def start_collecting(self, plan: RoundPlan) -> None: ...
    def note_delivered(self, plan: RoundPlan, hospitals: Sequence[str]) -> None: ...
    def note_aggregated(self, plan: RoundPlan, weights_after: str) -> None: ...
    def save_checkpoint(self, state: FederationState, result: RoundResult) -> None: ...
    def record(self, result: RoundResult) -> None: ...


class NoMirror:
    """The mirror of a federation that charges nothing."""

    def heads(self, hospitals: Sequence[str]) -> dict[str, str]:
        return {}

    def pin(self, keys: Mapping[str, str]) -> dict[str, str]:
        return {}

    def keep(self, rows: Iterable[LedgerRows]) -> dict[str, str]:
        return {}


def coalition_key(hospitals: Sequence[str], rounds: int) -> str:
    """Return the name under which a coalition's record is kept and its rounds are charged."""
    digest = hashlib.sha256("\n".join(sorted(hospitals)).encode()).hexdigest()[:12]
    return f"coalition-{len(hospitals)}-of-{rounds}-rounds-{digest}"


def coalition_run(run: RunConfig) -> RunConfig:
    """Return the configuration of the small federations: as many rounds as asked for, evaluated after the last."""
    rounds = run.evaluation.study_rounds or run.federation.rounds
    changes = {
        "rounds": rounds,
        "eval_every": rounds,
        "min_clients": 1,
        "min_available_clients": 1,
        "over_selection": 0.0,
        "stragglers": "drop",
        "patience": None,
    }
    return run.model_copy(update={"federation": run.federation.model_copy(update=changes)})


def train_in_turn(
    context: RoundContext, initial: Vector, coalitions: Sequence[tuple[str, ...]]
) -> Iterator[CoalitionRecord]:
    """Train one coalition after the other; the hospitals of each work at the same time where the pool can."""
    for hospitals in coalitions:
        yield train_coalition(context, initial, hospitals)


def train_coalition(context: RoundContext, initial: Vector, hospitals: Sequence[str]) -> CoalitionRecord:
    """Train a federation of these hospitals from the run's first weights, and score it at every hospital of the run.

    Raises:
      FederationError: a round was not published, or a hospital did not score the result.
    """
    run = coalition_run(context.run)
    rounds = run.federation.rounds if hospitals else 0
    own = replace(
        context,
        run=run,
        job=f"{context.job}/{coalition_key(hospitals, rounds)}",
        store=NoKeeper(),
        available=tuple(sorted(hospitals)),
        aggregation_weights={hospital: context.aggregation_weights[hospital] for hospital in hospitals},
        evaluated=(),
        emit=lambda event: None,
        select=partial(select_of_run, run),
    )
    state, history = FederationState(0, initial, context.strategy.init(context.layout.size)), RunHistory()
    while state.round < rounds:
        end = run_round(own, state, history)
        state, history, result = end.state, end.history, end.result
        if end.decision.verdict != "publish":
            why = "; ".join(f"{f.hospital}: {f.reason}" for f in result.receipt.failures) or end.decision.reason
            raise FederationError(f"the federation of {', '.join(own.available)} ended in round {result.round}: {why}")
    weights = released_weights(state.server_state, state.weights) if hospitals else initial
    evaluations = score_everywhere(context, weights, rounds, "a federation of fewer hospitals")
    return CoalitionRecord(hospitals=own.available, rounds=rounds, evaluations=evaluations)


def score_everywhere(context: RoundContext, weights: Vector, round: int, what: str) -> dict[str, SiteEvaluation]:
    """Score weights at every hospital of the run; `what` they are is for the message.

    Raises:
      FederationError: a hospital did not score them.
    """
    found = {}
    for answer in context.pool.evaluate(round, context.available, weights, pictures=False, deadline_s=None):
        if not isinstance(answer, SiteEvaluation):
            raise FederationError(f"{answer.hospital} did not score {what}: {answer.reason}")
        found[answer.hospital] = answer
    return dict(sorted(found.items()))
