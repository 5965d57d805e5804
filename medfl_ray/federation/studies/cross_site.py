"""What follows the rounds of a run beside its baselines: models of one hospital elsewhere, federations of fewer.

Every finished piece is kept, so that a resumed run repeats none; what a piece costs is charged when it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from medfl_ray.errors import FederationError
from medfl_ray.federation.events import BaselineProgress, Event, PhaseStarted
from medfl_ray.federation.ports import StudyStore
from medfl_ray.federation.round_context import RoundContext
from medfl_ray.federation.studies.coalitions import (
    TrainCoalitions,
    coalition_key,
    coalition_run,
    score_everywhere,
    train_in_turn,
)
from medfl_ray.federation.studies.shapley import Coalition, shapley_values
from medfl_ray.messages import HEADLINES, Metric
from medfl_ray.params import Vector
from medfl_ray.study_records import CoalitionRecord, ContributionRecord, SavedResult, StudiesRecord


def run_studies(
    context: RoundContext,
    initial: Vector,
    local_weights: Mapping[str, Vector],
    saved: StudyStore,
    emit: Callable[[Event], None],
    train: TrainCoalitions | None = None,
) -> StudiesRecord:
    """Do the studies that the run names; one that cannot be finished is named with its reason, and the others stand.

    Args:
      local_weights: the local baselines' weights [P], for the cross-site matrix.
      train: trains several coalitions at once; one after the other where it is absent.
    """
    evaluation = context.run.evaluation
    emit(PhaseStarted(name="studies"))
    coalitions = Coalitions(context, initial, saved, train or train_in_turn, emit)
    problems: list[str] = []
    record = StudiesRecord()

    def attempt(study: Callable[[], dict[str, object]]) -> None:
        nonlocal record
        try:
            record = record.model_copy(update=study())
        except FederationError as error:
            problems.append(str(error))

    if evaluation.cross_site:
        attempt(lambda: {"cross_site": cross_site(context, local_weights, saved)})
    if evaluation.leave_one_out:
        attempt(lambda: {"leave_one_out": leave_one_out(context.available, coalitions)})
    if evaluation.contributions is not None:
        attempt(lambda: {"contributions": contributions(context, coalitions)})
    return record.model_copy(update={"problems": tuple(problems)})


def cross_site(
    context: RoundContext, local_weights: Mapping[str, Vector], saved: StudyStore
) -> dict[str, dict[str, Metric]]:
    """Return the score of each hospital's own model at every hospital; what a hospital suppresses has no value.

    Raises:
      FederationError: a hospital has no model of its own, or did not score one.
    """
    missing = sorted(set(context.available) - set(local_weights))
    if missing:
        raise FederationError(f"the cross-site matrix lacks the local model of {', '.join(missing)}; see the failures")
    matrix = {}
    for owner, weights in sorted(local_weights.items()):
        name = f"cross-site-{owner}"
        kept = saved.load(name)
        if kept is None:
            kept = SavedResult({"scores": _headlines(context, owner, weights)})
            saved.save(name, kept)
        matrix[owner] = {hospital: Metric.model_validate(raw) for hospital, raw in kept.document["scores"].items()}
    return matrix


def _headlines(context: RoundContext, owner: str, weights: Vector) -> dict[str, object]:
    # In round 0 no hospital puts a model of its own in the place of the one that it is to score.
    evaluations = score_everywhere(context, weights, 0, f"the model of {owner}")
    scores = {hospital: headline_of(evaluation.metrics) for hospital, evaluation in evaluations.items()}
    return {hospital: metric.model_dump() for hospital, metric in scores.items() if metric is not None}


def headline_of(metrics: Mapping[str, Metric]) -> Metric | None:
    """Return Dice, or AUC, or accuracy: the first that there is."""
    return next((metrics[name] for name in HEADLINES if name in metrics), None)


@dataclass
class Coalitions:
    """Trained coalitions of a run: each is trained once, and kept."""

    context: RoundContext
    initial: Vector
    saved: StudyStore
    train: TrainCoalitions
    emit: Callable[[Event], None]
    done: dict[Coalition, CoalitionRecord] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Rounds of each."""
        return coalition_run(self.context.run).federation.rounds

    def records(self, wanted: Sequence[Coalition]) -> dict[Coalition, CoalitionRecord]:
        """Return the records of coalitions; those that no earlier attempt has kept are trained now."""
        missing = []
        for coalition in dict.fromkeys(wanted):
            kept = None if coalition in self.done else self.saved.load(self._key(coalition))
            if kept is not None:
                self.done[coalition] = CoalitionRecord.model_validate(kept.document)
            elif coalition not in self.done:
                missing.append(tuple(sorted(coalition)))
        for place, record in enumerate(self.train(self.context, self.initial, missing) if missing else (), start=1):
            coalition = frozenset(record.hospitals)
            self.saved.save(self._key(coalition), SavedResult(record.model_dump(mode="json")))
            self.done[coalition] = record
            name = ", ".join(record.hospitals) or "no hospital"
            self.emit(BaselineProgress(baseline=f"federation of {name}", done=place, total=len(missing)))
        return {coalition: self.done[coalition] for coalition in wanted}

    def values(self, wanted: Sequence[Coalition]) -> dict[Coalition, float]:
        """Return the pooled score of coalitions.

        Raises:
          FederationError: a hospital shows none.
        """
        found = {}
        for coalition, record in self.records(wanted).items():
            if record.value is None:
                raise FederationError("a contribution needs the score of every hospital, and one does not show its own")
            found[coalition] = record.value
        return found

    def _key(self, coalition: Coalition) -> str:
        return coalition_key(sorted(coalition), self.rounds if coalition else 0)


def without_each(hospitals: Sequence[str]) -> dict[str, Coalition]:
    """Return, per hospital, all the others."""
    return {hospital: frozenset(hospitals) - {hospital} for hospital in hospitals}


def leave_one_out(hospitals: Sequence[str], coalitions: Coalitions) -> dict[str, Metric]:
    """Return, per hospital, what a federation that never saw it scores on it."""
    others = without_each(hospitals)
    records = coalitions.records(list(others.values()))
    found = {}
    for hospital, rest in others.items():
        metric = headline_of(records[rest].evaluations[hospital].metrics)
        if metric is not None:
            found[hospital] = metric
    return found


def contributions(context: RoundContext, coalitions: Coalitions) -> ContributionRecord:
    """Return what each hospital adds to the pooled score of all, by the method that the run names."""
    evaluation, hospitals = context.run.evaluation, context.available
    everyone = frozenset(hospitals)
    if evaluation.contributions == "leave_one_out":
        others = without_each(hospitals)
        values = coalitions.values([everyone, *others.values()])
        return _record(
            coalitions,
            everyone,
            values={hospital: values[everyone] - values[rest] for hospital, rest in others.items()},
            standard_errors=dict.fromkeys(hospitals),
            method="leave_one_out",
            num_federations=1 + len(others),
        )
    found = shapley_values(
        hospitals, coalitions.values, evaluation.permutations, evaluation.truncation, context.run.federation.seed
    )
    return _record(
        coalitions,
        everyone,
        values=found.values,
        standard_errors=found.standard_errors,
        method="shapley",
        num_orders=found.num_orders,
        all_orders=found.all_orders,
        num_truncated=found.num_truncated,
        value_of_none=coalitions.values([frozenset()])[frozenset()],
        num_federations=sum(bool(coalition) for coalition in coalitions.done),
    )


def _record(coalitions: Coalitions, everyone: Coalition, **fields: object) -> ContributionRecord:
    """Add to a method's figures what both have."""
    of_all = coalitions.records([everyone])[everyone]
    return ContributionRecord.model_validate(
        {"rounds": coalitions.rounds, "value_of_all": of_all.value, "over_patients": of_all.over_patients, **fields}
    )
