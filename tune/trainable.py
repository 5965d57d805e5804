"""One trial: a whole federation in a process of Ray Tune, which continues where an earlier attempt of it ended."""

from __future__ import annotations

import json
import math
import os
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl_ray.config.files import dump_yaml
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import FederationError, MedflError, StorageError
from medfl_ray.federation.events import Event, RoundClosed
from medfl_ray.federation.planning import delta_of
from medfl_ray.messages import Metric, SiteEvaluation
from medfl_ray.privacy.account import INFINITE, Budgets, account_of
from medfl_ray.store.durable import replace_file
from medfl_ray.store.run.folder import RunFolder
from tune.budget import check_patient_level, trial_epsilon, with_noise
from tune.journal import RESULT, Result, trial_folder
from tune.space import Parameters, SearchConfig, trial_run

FAILURE = "failure.json"
LOCK_PATIENCE_S = 60.0
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a search shares; the folder is the search's, absolute."""

    search: SearchConfig
    raw: Mapping[str, Any]
    folder: Path

    def run_for(self, parameters: Parameters) -> tuple[RunConfig, tuple[SitePolicy, ...]]:
        """Return a trial's configuration and hospitals.

        Raises:
          MedflError: the parameters do not fit together, or a hospital refuses them.
        """
        run = trial_run(self.search, self.raw, parameters)
        check_patient_level(run)
        policies = tuple(list_hospitals(run))
        run = with_noise(run, policies)
        output = {"directory": self.folder / "trials"}
        if self.search.accounting != "compose" and not any(h.site_config for h in run.data.hospitals):
            output["state_directory"] = self.folder / "state"  # public data: no account outlives the search
        return run.model_copy(update={"output": run.output.model_copy(update=output)}), policies


def run_trial(config: Mapping[str, Any], plan: TrialPlan) -> None:
    """Run a trial inside Ray Tune, reporting each scored round and at last the final score.

    Raises:
      MedflError: the trial failed; its folder says why.
    """
    from ray import tune as ray_tune

    from tune.trial_pool import spare_the_collector

    # A trial that was stopped has this long to leave before the next one has its process; Ray reads it here, later.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(round(LOCK_PATIENCE_S)))
    # Ray Tune moves into a folder of its own for a trial; paths in a configuration start where the search did.
    os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", os.curdir))
    spare_the_collector()
    parameters = {name: config[name] for name in plan.search.space.ranges}
    execute(plan, int(config["number"]), parameters, ray_tune.report)


def execute(plan: TrialPlan, number: int, parameters: Parameters, report: Report) -> Result:
    """Run or continue a trial in its folder and return what it came to, which the folder keeps.

    Raises:
      MedflError: the trial failed; its folder says why.
    """
    folder = trial_folder(plan.folder, number)
    folder.mkdir(parents=True, exist_ok=True)
    kept = read_result(folder)
    try:
        result = kept or _federate(plan, folder, number, parameters, report)
    except MedflError as error:
        replace_file(folder / FAILURE, json.dumps({"reason": str(error)}).encode())
        raise
    replace_file(folder / RESULT, result.model_dump_json().encode())
    report(reported(result))
    return result


def reported(result: Result) -> dict[str, float]:
    """Return a result as Ray Tune takes it."""
    return {name: float(value) for name, value in result.model_dump().items()}


def read_result(folder: Path) -> Result | None:
    """Return the result of a trial that had ended before it could be told."""
    path = folder / RESULT
    return Result.model_validate_json(path.read_bytes()) if path.is_file() else None


def read_failure(folder: Path) -> str:
    """Return why a trial failed, as far as it could say so."""
    path = folder / FAILURE
    return str(json.loads(path.read_bytes())["reason"]) if path.is_file() else "the trial's process ended"


def _federate(plan: TrialPlan, folder: Path, number: int, parameters: Parameters, report: Report) -> Result:
    import torch

    torch.set_num_threads(1)
    run, policies = plan.run_for(parameters)
    # With accounting: select nothing that is released may tell how many trials there were.
    own = secrets.token_hex(4) if plan.search.accounting == "select" else f"{number:03d}"
    store = open_trial(folder, run, f"{plan.folder.name}-{own}")
    started = time.monotonic()
    epsilon = trial_epsilon(run, policies)

    def emit(event: Event) -> None:
        if isinstance(event, RoundClosed) and event.result.receipt.published:
            dice = mean_dice(event.result.metrics)
            if dice is not None and event.result.round < run.federation.rounds:
                rounds, size = event.result.round, whole_bytes(folder, run)
                early = Result(
                    epsilon=epsilon, dice=dice, low=dice, high=dice, size_bytes=size, rounds=rounds, spent=epsilon
                )
                report(reported(early))

    with patiently_locked(store):
        outcome = _run(store.run, policies, folder, emit)
        if not outcome.completed:
            raise FederationError(f"the trial ended early: {outcome.reason}")
        spent = own_spending(folder, run, policies, store.job)
        if math.isinf(spent):
            raise FederationError(
                "the trial used a hospital's data without patient-level differential privacy; its epsilon is "
                f"{INFINITE}, and no Dice is weighed against that"
            )
        dice, low, high = score(plan, folder, run)
        return Result(
            epsilon=epsilon,
            dice=dice,
            low=low,
            high=high,
            size_bytes=whole_bytes(folder, run),
            rounds=outcome.rounds_done,
            spent=spent,
            seconds=time.monotonic() - started,
        )


def _run(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, emit: Callable[[Event], None]) -> Any:
    if run.federation.pool == "virtual":
        from actors.simulation.run import simulate

        return simulate(run, policies, folder, emit)
    from actors.flower.rule import with_flower
    from medfl_ray.assembly.run import hospital_specs, run_in_process
    from tune.trial_pool import trial_pool

    pool = trial_pool(hospital_specs(run, policies, folder))
    return run_in_process(run, policies, folder, pool, emit, threading.Event(), with_flower(run, emit))


def open_trial(folder: Path, run: RunConfig, job: str) -> RunFolder:
    """Return the folder of a trial's run, made when it is first opened."""
    if not (folder / "config.yaml").is_file():
        replace_file(folder / "job", job.encode())
        replace_file(folder / "config.yaml", dump_yaml(run).encode())
    return RunFolder.open(folder)


@contextmanager
def patiently_locked(store: RunFolder) -> Iterator[None]:
    """Hold a trial's run; a process of an earlier attempt may need a moment to notice that its search has ended.

    Raises:
      StorageError: it does not end.
    """
    until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        lock = store.locked()
        try:
            lock.__enter__()
            break
        except StorageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def mean_dice(metrics: Mapping[str, Mapping[str, Metric]]) -> float | None:
    """Return the mean over the hospitals that show their Dice of a round; None where none does."""
    shown = [table["dice"].value for table in metrics.values() if "dice" in table]
    known = [value for value in shown if value is not None]
    return statistics.fmean(known) if known else None


def whole_bytes(folder: Path, run: RunConfig) -> float:
    """Return the bytes of weights that the whole run moves, down to and up from every hospital that it asks."""
    from medfl_ray.store.run.checkpoints import last_good_checkpoint

    checkpoint, _ = last_good_checkpoint(folder / "checkpoints")
    assert checkpoint is not None  # a round was published
    asked = len(checkpoint.result.receipt.asked)
    return float(2 * asked * run.federation.rounds * checkpoint.weights.nbytes)


def score(plan: TrialPlan, folder: Path, run: RunConfig) -> tuple[float, float, float]:
    """Return Dice and its 95 % interval over patients: of the public images, or of the hospitals that show theirs.

    Raises:
      FederationError: nobody showed a score.
    """
    from medfl_ray.training.scoring.evaluation import PatientScore
    from medfl_ray.training.scoring.intervals import bootstrap_intervals

    if plan.search.score_data is not None:
        scores = score_folder(folder, run, plan.search.score_data)
    else:
        answers = json.loads((folder / "evaluation.json").read_bytes())
        sites = [SiteEvaluation.model_validate(answer) for answer in answers.values()]
        scores = [value for site in sites for value in site.patient_scores or ()]
    if not scores:
        raise FederationError("no hospital showed a score of a held-out patient; give score_data, or hold patients out")
    low, high = bootstrap_intervals([PatientScore(dice={"all": value}) for value in scores])["dice"]
    return statistics.fmean(scores), low, high


def score_folder(folder: Path, run: RunConfig, directory: Path) -> list[float]:
    """Return the Dice of the final weights on every patient of a folder of public labelled images."""
    from medfl_ray.data.layouts.labelled_folder import open_labelled_folder
    from medfl_ray.export.package import open_public_data, read_package
    from medfl_ray.export.weights import load_weights
    from medfl_ray.training.trainer import Trainer

    package = read_package(folder, run, open_public_data(run))
    labelled = open_labelled_folder(directory, "auto", package.task, package.preprocessing, package.labels)
    trainer = Trainer(
        package.model,
        run.training,
        package.task,
        package.spatial_dims,
        package.num_channels,
        package.out_channels,
        package.patch_size,
        for_dp=False,
    )
    weights = load_weights(folder / "model.safetensors", trainer.layout)
    return [patient.headline for patient in trainer.score_cases(weights, labelled.holdout, labelled.labels)]


def own_spending(folder: Path, run: RunConfig, policies: Sequence[SitePolicy], job: str) -> float:
    """Return the largest epsilon that this trial's own job amounts to at a hospital, from the ledgers.

    Infinite where the job used a hospital's data without patient-level protection.
    """
    exports = json.loads((folder / "ledger.json").read_bytes())
    found = 0.0
    for policy in policies:
        rows = exports.get(policy.hospital, {}).get("events", ())
        account = (policy.hospital, policy.data_set)
        own = account_of(account, rows, job, delta_of(run, policy), Budgets()).run
        assert own is not None  # there are rows, not a receipt alone
        found = max(found, own.epsilon)
    return found
