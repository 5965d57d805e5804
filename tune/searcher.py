"""What Ray Tune asks during a search: the next trial, from Optuna by way of the journal, and whether one may go on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.storages import InMemoryStorage
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune.journal import Journal, Result, Trial, trial_folder
from tune.pareto import Point, beats
from tune.space import SearchConfig
from tune.trainable import read_failure, read_result

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

OBJECTIVES = ("epsilon", "dice", "size_bytes")
MODES = ("min", "max", "min")
STUDY = "search"
NEVER = math.inf
Progress = Callable[[Trial], None]


def build_sampler(search: SearchConfig) -> BaseSampler:
    """Return Optuna's sampler; the start at random is a third of the trials, ten at most."""
    from optuna import samplers

    if search.sampler == "random":
        return samplers.RandomSampler(seed=search.seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=search.seed, population_size=max(4, search.trials // 4))
    return samplers.TPESampler(seed=search.seed, n_startup_trials=min(10, max(3, search.trials // 3)))


def known_study(search: SearchConfig, trials: list[Trial], storage: BaseStorage | None = None) -> Study:
    """Return an Optuna study that knows every trial that has ended: what a resumed search learns from."""
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in MODES]
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions, sampler=build_sampler(search))
    distributions = search.space.distributions()
    for trial in trials:
        if trial.ended and trial.result is not None:
            values = [float(getattr(trial.result, name)) for name in OBJECTIVES]
            study.add_trial(
                optuna.trial.create_trial(params=trial.parameters, distributions=distributions, values=values)
            )
    return study


class JournaledSearch(Searcher):
    """Optuna's suggestions, each written down before its trial starts and when it has ended.

    Trials that an earlier process started and did not end come first, under their old numbers and in their folders.
    """

    def __init__(self, search: SearchConfig, folder: Path, rounds: int, progress: Progress | None = None) -> None:
        super().__init__(metric=list(OBJECTIVES), mode=list(MODES))  # type: ignore[arg-type] # several are allowed
        self._journal = Journal(folder)
        known = self._journal.trials()
        self._rounds, self._progress = rounds, progress
        self._unfinished = deque(trial for trial in known if not trial.ended)
        self._next = max((trial.number for trial in known), default=-1) + 1
        self._running: dict[str, Trial] = {}
        # Another seed than before the interruption: the same draws again would be the same trials again.
        drawn = search.model_copy(update={"seed": search.seed + 1000 * self._next})
        storage = InMemoryStorage()
        known_study(drawn, known, storage)
        self._optuna = OptunaSearch(
            search.space.distributions(),
            metric=list(OBJECTIVES),
            mode=list(MODES),
            storage=storage,
            sampler=build_sampler(drawn),
            study_name=STUDY,
            points_to_evaluate=[dict(trial.parameters) for trial in self._unfinished] or None,
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the next trial's parameters and number."""
        drawn = self._optuna.suggest(trial_id)
        assert drawn is not None  # Optuna always has a next point
        if self._unfinished:
            trial = self._unfinished.popleft()
        else:
            trial = Trial(number=self._next, state="started", parameters=drawn)
            self._next += 1
            self._journal.append(trial)
        self._running[trial_id] = trial
        return {**trial.parameters, "number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended, and let Optuna learn from it."""
        trial = self._running.pop(trial_id, None)
        if trial is not None:
            ended = ending(self._journal.folder, trial, result, error, self._rounds)
            self._journal.append(ended)
            if self._progress is not None:
                self._progress(ended)
        self._optuna.on_trial_complete(trial_id, result, error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ray asks for it; Optuna learns from ended trials alone where there are several objectives."""

    def save(self, checkpoint_path: str) -> None:
        """Leave a note where Ray expects a state: the journal holds it all."""
        Path(checkpoint_path).write_text("see trials.jsonl\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed search is built from the journal."""


def ending(folder: Path, trial: Trial, result: dict[str, Any] | None, error: bool, rounds: int) -> Trial:
    """Return the journal's last line of a trial: what its folder says first, otherwise Ray's last report."""
    place = trial_folder(folder, trial.number)
    kept = read_result(place)
    if kept is not None:
        return trial.model_copy(update={"state": "finished", "result": kept})
    if error or result is None:
        return trial.model_copy(update={"state": "failed", "reason": read_failure(place)})
    early = Result.model_validate({name: result[name] for name in Result.model_fields if name in result})
    reason = f"stopped after round {early.rounds} of {rounds}: others did better at the same cost"
    return trial.model_copy(update={"state": "stopped", "result": early, "reason": reason})


class KeepsFront:
    """A stopping rule that spares whatever no other trial beats so far.

    Dice alone would end the trials with the smallest epsilon first, and with them one end of the front.
    """

    _latest: dict[str, dict[int, Point]]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return what the rule says, or to go on where the trial is on the front at this round."""
        action: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        seen = self.__dict__.setdefault("_latest", {})
        own = Point(
            0,
            float(result["epsilon"]),
            float(result["dice"]),
            float(result["size_bytes"]),
            float(result["low"]),
            float(result["high"]),
        )
        seen.setdefault(trial.trial_id, {})[int(result["rounds"])] = own
        if action == TrialScheduler.STOP and not _is_beaten(own, int(result["rounds"]), trial.trial_id, seen):
            self.__dict__.get("_stopped_trials", set()).discard(trial)
            return str(TrialScheduler.CONTINUE)
        return action


def _is_beaten(own: Point, round: int, name: str, seen: dict[str, dict[int, Point]]) -> bool:
    """Say whether another trial was better at this round or before it."""
    for other, rounds in seen.items():
        reached = [number for number in rounds if number <= round]
        if other != name and reached and beats(rounds[max(reached)], own):
            return True
    return False


class FrontHalving(KeepsFront, AsyncHyperBandScheduler):
    """Asynchronous successive halving (ASHA) that spares the front."""


class FrontMedian(KeepsFront, MedianStoppingRule):
    """Median stopping that spares the front."""


def build_scheduler(search: SearchConfig, rounds: int) -> TrialScheduler:
    """Return the rule that stops trials on their rounds."""
    if search.stopping == "asha" and rounds > search.grace_rounds:
        return FrontHalving(
            time_attr="rounds",
            metric="dice",
            mode="max",
            grace_period=search.grace_rounds,
            max_t=rounds + 1,
            reduction_factor=2,
            stop_last_trials=False,
        )
    if search.stopping == "median" and rounds > search.grace_rounds:
        return FrontMedian(
            time_attr="rounds",
            metric="dice",
            mode="max",
            grace_period=search.grace_rounds,
            min_samples_required=3,
            min_time_slice=NEVER,  # type: ignore[arg-type] # a pause would end the trial's process, and the round under way be charged twice
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]
