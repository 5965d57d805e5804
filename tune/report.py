"""From the journal of a search to its report, and to the answer to how much epsilon a Dice needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from medfl_ray.analytics.report import config_text
from medfl_ray.analytics.search_report import write_search_report
from medfl_ray.analytics.search_summary import SearchSummary, TrialRow
from medfl_ray.errors import ConfigError
from tune.budget import composed_words
from tune.journal import Journal, Trial, points
from tune.pareto import Point, epsilon_for, front, privacy_front
from tune.search import Outcome, Search, known_accounts, open_results, recommended_run
from tune.space import SearchConfig

ENOUGH_FOR_IMPORTANCE = 6


def write_report(outcome: Outcome) -> Path:
    """Write report.html into a search's folder and return its path."""
    path = outcome.search.folder / "report.html"
    write_search_report(path, summarise(outcome))
    return path


def summarise(outcome: Outcome) -> SearchSummary:
    """Return what the report says."""
    search, config = outcome.search, outcome.search.plan.search
    best = next((t for t in outcome.trials if outcome.best and t.number == outcome.best.number), None)
    trials = [best] if config.accounting == "select" and best is not None else outcome.trials
    worst_case = known_accounts(search)
    infinite = [hospital for hospital, epsilon in worst_case.items() if math.isinf(epsilon)]
    on_front = {point.number for point in front(points(trials))}
    return SearchSummary(
        name=config.name,
        rows=[row_of(t, t.number in on_front, t is best) for t in trials if t.result is not None],
        failed={t.number: t.reason for t in trials if t.state == "failed"},
        num_trials=search.num_trials,
        planned_rounds=search.rounds,
        accounting=config.accounting,
        words=composed_words(infinite) if config.accounting == "compose" else search.terms.words,
        delta=search.terms.delta,
        worst_case=worst_case,
        selected=search.terms.selected,
        importance=importance(config, trials),
        judged_on=judged_on(search),
        recommended_text="" if best is None else config_text(recommended_run(search, best)),
        config_text=search_text(config),
        wanted_dice=config.wanted_dice,
    )


def row_of(trial: Trial, on_front: bool, recommended: bool) -> TrialRow:
    """Return a trial as the report shows it."""
    result = trial.result
    assert result is not None
    return TrialRow(
        number=trial.number,
        state=trial.state,
        parameters=trial.parameters,
        epsilon=result.epsilon,
        dice=result.dice,
        low=result.low,
        high=result.high,
        size_bytes=result.size_bytes,
        rounds=result.rounds,
        on_front=on_front,
        recommended=recommended,
        reason=trial.reason,
    )


def judged_on(search: Search) -> str:
    """Return on whose images the trials were judged."""
    if search.plan.search.score_data is not None:
        return "public images"
    kinds = sorted({policy.declared for policy in search.policies if policy.declared != "private"})
    return " and ".join(kinds) + " held-out patients"


def search_text(config: SearchConfig) -> str:
    """Return a search's configuration as YAML, folders and files by name alone: a path tells of who started it."""
    raw = config.model_dump(mode="json", exclude_none=True)
    for name in ("run", "directory", "score_data"):
        if name in raw:
            raw[name] = Path(raw[name]).name
    if isinstance(raw.get("data"), dict) and "directory" in raw["data"]:
        raw["data"]["directory"] = Path(raw["data"]["directory"]).name
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def importance(config: SearchConfig, trials: Sequence[Trial]) -> dict[str, float] | None:
    """Return the share of the differences in Dice that each parameter explains, by Optuna's fANOVA.

    None where fewer than six trials finished, or all have the same Dice.
    """
    finished = [trial for trial in trials if trial.state == "finished" and trial.result is not None]
    if len(finished) < ENOUGH_FOR_IMPORTANCE or len({t.result.dice for t in finished if t.result}) < 2:
        return None
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    from tune.searcher import known_study

    study = known_study(config, finished)
    shares = get_param_importances(
        study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda trial: trial.values[1]
    )
    return {name: float(share) for name, share in shares.items()}


@dataclass(frozen=True)
class TrialAnswer:
    """How much epsilon a Dice needs, by a search's trials; `nearest` is the trial that reached it most cheaply.

    epsilon: None where no trial reached the Dice; `best` is then how far they came.
    """

    dice: float
    epsilon: float | None
    delta: float
    nearest: Point | None
    best: Point
    smallest_tried: bool
    judged_on: str
    num_trials: int


def epsilon_needed(folder: Path, dice: float) -> TrialAnswer:
    """Say what epsilon a Dice needs, by the finished trials of a search.

    Raises:
      ConfigError: the folder is not a search's, no trial has finished, or only its best one was released.
    """
    search = open_results(folder)
    known = points(Journal(folder).trials())
    if search.plan.search.accounting == "select":
        raise ConfigError(
            f"the search {folder.name!r} releases its best trial alone; what epsilon another Dice needs is not released"
        )
    if not known:
        raise ConfigError(
            f"no trial of the search {folder.name!r} has finished; continue it with medfl-ray tune --resume"
        )
    rising = privacy_front(known)
    nearest = next((point for point in rising if point.dice >= dice), None)
    return TrialAnswer(
        dice=dice,
        epsilon=epsilon_for(known, dice),
        delta=search.terms.delta,
        nearest=nearest,
        best=rising[-1],
        smallest_tried=nearest is rising[0],
        judged_on=judged_on(search),
        num_trials=len(known),
    )
