"""A search from its YAML file to front and recommendation. `python -m tune.search CONFIG` is `medfl-ray tune CONFIG`.

The search's folder holds all of its state; a search that was ended at any point goes on from there.
"""

from __future__ import annotations

import math
import os
import runpy
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from medfl_ray.config.files import dump_yaml, parse_model, read_yaml
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ClusterError, ConfigError, FederationError, StorageError
from medfl_ray.store.durable import replace_file
from tune.accounts import Past, largest_known, past_of
from tune.budget import Terms, check_terms, first_point
from tune.journal import Journal, Trial, points
from tune.pareto import Point, balanced, cheapest
from tune.space import NumTrials, SearchConfig, base_run, trial_run, with_parameters
from tune.trainable import TrialPlan, run_trial

SEARCH, RUN, RECOMMENDED, SECRET = "search.yaml", "run.yaml", "recommended.yaml", "num_trials"


@dataclass(frozen=True)
class Search:
    """A search in its folder, checked and ready to go on."""

    plan: TrialPlan
    policies: tuple[SitePolicy, ...]
    rounds: int
    terms: Terms
    num_trials: int

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.plan.folder

    @property
    def journal(self) -> Journal:
        """Its trials."""
        return Journal(self.plan.folder)


@dataclass(frozen=True)
class Outcome:
    """How a search ended; `best` is what is recommended, None where no trial finished."""

    search: Search
    trials: list[Trial]
    best: Point | None
    completed: bool


def create_search(search: SearchConfig) -> Search:
    """Check a new search and make its folder, in which everything that it needs is kept.

    Raises:
      MedflError: it is refused before anything is made; see `check_terms`.
    """
    raw = base_run(search)
    _check(TrialPlan(search, raw, Path()), search.trials)
    folder = search.directory / f"{datetime.now():%Y%m%d-%H%M%S}-{search.name}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the search's folder {folder.name!r}: {error.strerror}; choose another directory"
        ) from None
    kept = search.model_copy(update={"run": Path(RUN), "overrides": ()})
    replace_file(folder / RUN, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).encode())
    if search.num_trials is not None:
        replace_file(folder / SECRET, str(draw_num_trials(search.num_trials)).encode())
    replace_file(folder / SEARCH, dump_yaml(kept).encode())
    return open_search(folder)


def open_search(folder: Path) -> Search:
    """Open a search to begin or continue it; what is left of it is checked against the budgets once more.

    Raises:
      ConfigError: the folder is not a search's.
      MedflError: the rest of it is refused.
    """
    plan = read_plan(folder)
    secret = folder / SECRET
    num_trials = int(secret.read_text()) if secret.is_file() else plan.search.trials
    ended = sum(trial.ended for trial in Journal(plan.folder).trials())
    policies, terms = _check(plan, num_trials - ended)
    return Search(plan, policies, _first_run(plan).federation.rounds, terms, num_trials)


def open_results(folder: Path) -> Search:
    """Open a search to read what it found: nothing is left to check against budgets.

    Raises:
      ConfigError: the folder is not a search's.
    """
    plan = read_plan(folder)
    policies, terms = _check(plan, 0)
    return Search(plan, policies, _first_run(plan).federation.rounds, terms, plan.search.trials)


def read_plan(folder: Path) -> TrialPlan:
    """Read what a search was started with.

    Raises:
      ConfigError: the folder is not a search's.
    """
    if not (folder / SEARCH).is_file():
        raise ConfigError(f"{folder.name!r} is not the folder of a search: it has no {SEARCH}")
    search = parse_model(SearchConfig, read_yaml(folder / SEARCH), SEARCH)
    search = search.model_copy(update={"run": folder / RUN})
    return TrialPlan(search, read_yaml(folder / RUN), folder.absolute())


def draw_num_trials(drawn: NumTrials) -> int:
    """Draw the secret number of trials, from the operating system's entropy; a Poisson draw of 0 is no search.

    Raises:
      FederationError: the draw was 0, for which repeat-and-select accounting releases nothing.
    """
    from numpy.random import default_rng
    from scipy.stats import nbinom

    rng = default_rng(secrets.randbits(128))
    if drawn.distribution == "poisson":
        number = int(rng.poisson(drawn.mean))
        if number == 0:
            raise FederationError("the random number of trials was drawn as 0: nothing is released; start again")
        return number
    if drawn.mean == 1:
        return 1
    success = negative_binomial_parameter(drawn.mean, drawn.shape)
    while True:
        number = int(nbinom.rvs(drawn.shape, success, random_state=rng))
        if number > 0:
            return number


def negative_binomial_parameter(mean: float, shape: float) -> float:
    """Return the success probability with which a negative binomial without zero has this mean."""
    from scipy.optimize import brentq
    from scipy.stats import nbinom

    def surplus(probability: float) -> float:
        return float(nbinom.mean(shape, probability) / nbinom.sf(0, shape, probability)) - mean

    return float(brentq(surplus, 1e-9, 1 - 1e-9))


def _first_run(plan: TrialPlan) -> RunConfig:
    return trial_run(plan.search, plan.raw, first_point(plan.search))


def _check(plan: TrialPlan, num_left: int) -> tuple[tuple[SitePolicy, ...], Terms]:
    run = _first_run(plan)
    policies = tuple(list_hospitals(run))
    history = past_of(run, policies, plan.folder) if plan.search.accounting == "compose" else Past()
    return policies, check_terms(plan.search, plan.raw, policies, history, max(0, num_left))


def known_accounts(search: Search) -> dict[str, float]:
    """Return per hospital the epsilon for the report: the checked worst case, or what its ledger holds where more.

    Raises:
      LedgerError: a ledger is damaged.
    """
    if search.plan.search.accounting != "compose":
        return dict(search.terms.worst_case)
    run = _first_run(search.plan)
    history = past_of(run, search.policies, search.folder)
    return largest_known(search.terms.worst_case, history, run, search.policies)


def run_search(search: Search, num_cpus: float, progress: Any = None) -> Outcome:
    """Run what is left of a search on the connected Ray cluster.

    Args:
      num_cpus: of the cluster; decides how many trials run at once.
      progress: called with every trial as it ends.

    Raises:
      ClusterError: Ray Tune itself failed.
    """
    left = search.num_trials - sum(trial.ended for trial in search.journal.trials())
    if left > 0:
        _tune(search, left, num_cpus, progress)
    trials = search.journal.trials()
    completed = sum(trial.ended for trial in trials) >= search.num_trials
    return Outcome(search, trials, recommend(search.plan.search, trials), completed)


def _tune(search: Search, left: int, num_cpus: float, progress: Any) -> None:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other display prints its frame at every verbosity
    from ray import tune as ray_tune
    from ray.exceptions import RayError

    from tune.searcher import JournaledSearch, build_scheduler
    from tune.trial_pool import sweep_after

    config = search.plan.search
    at_once = 1 if config.accounting == "compose" else config.max_concurrent
    fitting = max(1, math.floor(num_cpus / config.cpus_per_trial + 1e-9))
    with tempfile.TemporaryDirectory(prefix="medfl-search-", ignore_cleanup_errors=True) as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(run_trial, plan=search.plan), resources(config)),
            tune_config=ray_tune.TuneConfig(
                search_alg=JournaledSearch(config, search.folder, search.rounds, progress),
                scheduler=build_scheduler(config, search.rounds),
                num_samples=left,
                max_concurrent_trials=min(at_once or fitting, fitting),
                reuse_actors=True,  # a trial's process has loaded the libraries and prepared the images for the next
                trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name=search.folder.name,
                storage_path=scratch,
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            tuner.fit()
        except RayError as error:
            raise ClusterError(
                f"Ray Tune ended with {type(error).__name__}; nothing that has ended is lost: medfl-ray tune --resume "
                f"{search.folder.name}"
            ) from None
        finally:
            sweep_after(cache_folders(search))


def cache_folders(search: Search) -> list[Path]:
    """Return where this machine's hospitals may keep prepared images of private patients on the disk."""
    from medfl_ray.assembly.hospital import CACHE_FOLDER
    from medfl_ray.federation.hospital_rules.private_answers import is_confidential
    from medfl_ray.store.state_folders import hospital_folder, state_root

    run = _first_run(search.plan)
    if run.data.cache != "disk":
        return []
    root = state_root(run)
    private = [policy for policy in search.policies if is_confidential(policy)]
    return [hospital_folder(policy, search.folder, root) / CACHE_FOLDER for policy in private]


def resources(search: SearchConfig) -> Any:
    """Return what a trial holds: one process, or a driver and the actors of its virtual hospitals."""
    from ray import tune as ray_tune

    if search.pool == "local":
        return {"cpu": search.cpus_per_trial, "gpu": search.gpus_per_trial}
    actors = max(1, int(search.cpus_per_trial))
    own = 0.9 * min(1.0, search.cpus_per_trial)
    actor = {"CPU": own, "GPU": search.gpus_per_trial / actors}
    return ray_tune.PlacementGroupFactory([{"CPU": 0.05}, *([actor] * actors)])


def recommend(search: SearchConfig, trials: Sequence[Trial]) -> Point | None:
    """Return the trial to use: the cheapest with the wanted Dice, or the best balance; the best Dice with `select`."""
    known = points(trials)
    if search.accounting == "select":
        return max(known, key=lambda point: (point.dice, -point.number), default=None)
    wanted = cheapest(known, search.wanted_dice) if search.wanted_dice is not None else None
    return wanted or balanced(known)


def recommended_run(search: Search, trial: Trial) -> RunConfig:
    """Return the final run with a trial's parameters, on the final run's own data."""
    return with_parameters(search.plan.search, search.plan.raw, trial.parameters)


def write_recommendation(outcome: Outcome) -> Path | None:
    """Write the recommended configuration as YAML and return its path; None where no trial finished."""
    if outcome.best is None:
        return None
    best = next(trial for trial in outcome.trials if trial.number == outcome.best.number)
    path = outcome.search.folder / RECOMMENDED
    replace_file(path, dump_yaml(recommended_run(outcome.search, best)).encode())
    return path


def forget_all_but_best(outcome: Outcome) -> None:
    """Remove whatever `select` does not release: the other trials, their order and how many there were."""
    folder, best = outcome.search.folder, outcome.best
    if outcome.search.plan.search.accounting != "select" or not outcome.completed or best is None:
        return
    own = next(trial for trial in outcome.trials if trial.number == best.number)
    kept = folder / "best"
    source = outcome.search.journal.trial_folder(best.number)
    if source.is_dir() and not kept.exists():
        source.rename(kept)
    replace_file(folder / "trials.jsonl", (own.model_copy(update={"number": 0}).model_dump_json() + "\n").encode())
    replace_file(folder / SECRET, b"1")
    shutil.rmtree(folder / "trials", ignore_errors=True)
    shutil.rmtree(folder / "state", ignore_errors=True)


if __name__ == "__main__":
    # The command line is the composition root and knows this package, so it is started, not imported.
    sys.argv.insert(1, "tune")
    runpy.run_module("medfl_ray.cli.main", run_name="__main__")
