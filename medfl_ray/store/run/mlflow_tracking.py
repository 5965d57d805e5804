"""A copy of a run in MLflow, where the configuration names a store: parameters, figures, files and the model's alias.

MLflow's store lies outside of the run's folder, so that figures go there only labelled public or charged. A store that
cannot be reached stops a run before it starts; later it is only named, and the run goes on without it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError
from medfl_ray.messages import PrivacySpent, RoundResult
from medfl_ray.privacy.account import INFINITE, PrivacyAccount, epsilon_words, parts_words
from medfl_ray.privacy.run_accounts import accounts_of_run
from medfl_ray.round_times import clock_of, has_secret_cohorts

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from medfl_ray.store.registry.model_records import ModelVersion

SHOWN_LABELS = ("public", "charged")
FILES = ("report.html", "model.onnx", "receipts.jsonl", "ledger.json")
LEFT_OUT: dict[str, Any] = {
    "output": True,
    "data": {"directory": True, "hospitals": {"__all__": {"directory", "site_config"}}},
    "training": {"initial_weights": True},
}
RUN_TAG, VERSION_TAG = "medfl.run", "medfl.version"
AT_ONCE = 100
"""Parameters in one call; MLflow takes no more."""


class MlflowRun:
    """One run in MLflow; a run that is resumed goes on in the same one."""

    def __init__(self, run: RunConfig, name: str) -> None:
        """Find the run by its folder's name, or make it with its parameters.

        Raises:
          ConfigError: MLflow is not installed, or its store cannot be opened.
        """
        assert run.output.mlflow is not None
        self.problem: str | None = None
        self._run = run
        self._clock = clock_of(has_secret_cohorts(run))
        self._client = open_client(run.output.mlflow.tracking_uri)
        try:
            experiment = self._experiment(run.output.mlflow.experiment or run.name, run.output.mlflow.tracking_uri)
            known = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
            self._run_id: str = known[0].info.run_id if known else self._create(experiment, run, name)
        except Exception as error:  # noqa: BLE001 - whatever MLflow or its database says becomes one sentence
            raise ConfigError(
                f"MLflow's store did not answer ({type(error).__name__}); check output.mlflow.tracking_uri, or leave "
                "output.mlflow out"
            ) from None

    def add_round(self, result: RoundResult) -> None:
        """Take a closed round's figures; after a first failure nothing more is sent."""
        if self.problem is None:
            self._attempt(lambda: self._log_round(result))

    def finish(self, folder: Path, completed: bool, version: ModelVersion | None) -> None:
        """Copy the run's accounts and files, and let the registered model's aliases say its stages."""

        def work() -> None:
            self._log_accounts(folder)
            for name in FILES:
                if (folder / name).is_file():
                    self._client.log_artifact(self._run_id, str(folder / name))
            if version is not None:
                mirror_version(self._client, version, self._run_id)
            ended_ms = int(1000 * self._clock().timestamp())
            self._client.set_terminated(self._run_id, "FINISHED" if completed else "KILLED", ended_ms)

        self._attempt(work)

    def _experiment(self, name: str, tracking_uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = tracking_uri.removeprefix("sqlite:///")
        place = None if local == tracking_uri else (Path(local).resolve().parent / "mlflow-artifacts").as_uri()
        return str(self._client.create_experiment(name, artifact_location=place))

    def _create(self, experiment: str, run: RunConfig, name: str) -> str:
        from mlflow.entities import Param

        tags = {RUN_TAG: name, **{f"medfl.tag.{tag}": "true" for tag in run.tags}}
        run_id: str = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        found = [Param(key, str(value)[:6000]) for key, value in parameters(run)]
        for start in range(0, len(found), AT_ONCE):
            self._client.log_batch(run_id, params=found[start : start + AT_ONCE])
        return run_id

    def _log_round(self, result: RoundResult) -> None:
        from mlflow.entities import Metric, RunTag

        receipt = result.receipt
        ended_ms = int(1000 * datetime.fromisoformat(receipt.ended_at).timestamp())
        metrics = [Metric(key, value, ended_ms, receipt.round) for key, value in shown_figures(result)]
        accounts = [RunTag(f"epsilon.{hospital}", terms_so_far(spent)) for hospital, spent in receipt.spent.items()]
        self._log(metrics, accounts)

    def _log_accounts(self, folder: Path) -> None:
        """Log what everything has cost, baselines and studies included, at the step behind the last round."""
        from mlflow.entities import Metric, RunTag

        accounts = accounts_of_run(folder, self._run)
        now_ms, step = int(1000 * self._clock().timestamp()), self._run.federation.rounds + 1
        metrics = [
            Metric(key, value, now_ms, step)
            for name, of in accounts.items()
            for key, value in account_figures(name, of)
        ]
        self._log(metrics, [RunTag(f"epsilon.{name}", final_terms(account)) for name, account in accounts.items()])

    def _log(self, metrics: Sequence[Any], tags: Sequence[Any]) -> None:
        for start in range(0, max(len(metrics), len(tags)), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            self._client.log_batch(self._run_id, metrics=metrics[part], tags=tags[part])

    def _attempt(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a run does not end because a copy of it could not be written
            self.problem = f"MLflow's store did not answer ({type(error).__name__}); its copy of the run is incomplete"


def open_client(tracking_uri: str) -> MlflowClient:
    """Return a client of MLflow's store that sends nothing elsewhere.

    Raises:
      ConfigError: MLflow is not installed.
    """
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
    ):
        os.environ.setdefault(name, value)
    for chatty in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise ConfigError(
            "output.mlflow needs MLflow, which is not installed: pip install 'medfl-ray[mlflow]', or leave it out"
        ) from None
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def mirror_version(client: MlflowClient, version: ModelVersion, run_id: str) -> None:
    """Register a version of our registry in MLflow's, where its alias is its stage: candidate or champion."""
    if not client.search_registered_models(f"name = '{version.name}'"):
        client.create_registered_model(version.name)
    known = [found for found in _versions(client, version.name) if found.tags.get(VERSION_TAG) == str(version.version)]
    if not known:
        source = f"{client.get_run(run_id).info.artifact_uri}/model.onnx"
        tags = {VERSION_TAG: str(version.version)}
        client.create_model_version(version.name, source=source, run_id=run_id, tags=tags)
    mirror_stages(client, version.name, {version.version: version.stage})


def mirror_stages(client: MlflowClient, name: str, stages: Mapping[int, str]) -> list[str]:
    """Set MLflow's aliases of a model after its versions' stages in our registry, and say what they are now.

    Candidates may be many, and an alias names one version: the newest. A retired version has none.
    """
    theirs = {int(found.tags[VERSION_TAG]): found.version for found in _versions(client, name)}
    said = []
    for alias in ("candidate", "champion"):
        holders = [number for number, stage in stages.items() if stage == alias and number in theirs]
        if holders:
            client.set_registered_model_alias(name, alias, theirs[max(holders)])
            said.append(f"{alias} is version {max(holders)}")
        elif alias in client.get_registered_model(name).aliases and stages.keys() >= theirs.keys():
            client.delete_registered_model_alias(name, alias)
    return said


def parameters(run: RunConfig) -> Iterator[tuple[str, object]]:
    """Yield what a run was told, by the names of its configuration; no folder and no empty field."""
    yield from _leaves(run.model_dump(mode="json", exclude=LEFT_OUT))


def shown_figures(result: RoundResult) -> Iterator[tuple[str, float]]:
    """Yield the figures of a round that may leave the run's folder, by hospital and name."""
    for hospital, metrics in result.metrics.items():
        for name, figure in metrics.items():
            if figure.label in SHOWN_LABELS and figure.value is not None:
                yield f"{hospital}/{name}", figure.value
    for hospital, spent in result.receipt.spent.items():
        if math.isfinite(spent.epsilon):  # MLflow would store the largest number that it has; the tag says it
            yield f"{hospital}/epsilon", spent.epsilon


def account_figures(hospital: str, account: PrivacyAccount) -> Iterator[tuple[str, float]]:
    """Yield the finite epsilons of an account: in all, of the run's rounds, of its baselines and studies."""
    parts = {"epsilon": account.total, "epsilon_run": account.run, "epsilon_extra": account.extra}
    for name, part in parts.items():
        if part is not None and math.isfinite(part.epsilon):
            yield f"{hospital}/{name}", part.epsilon


def terms_so_far(spent: PrivacySpent) -> str:
    """Say what the epsilon of a round means, to stand beside it."""
    budget = "no lifetime budget" if spent.budget is None else f"lifetime budget {spent.budget:g}"
    infinite = f"{INFINITE}, " if spent.is_unprotected else ""
    return f"{infinite}{_labels(spent.unit, spent.delta, spent.adjacency)}, {budget}; of the account, so far"


def final_terms(account: PrivacyAccount) -> str:
    """Say what the epsilons of an account mean once everything was charged."""
    total = account.total
    return (
        f"{_labels(account.unit, total.delta, account.adjacency)}; in all {epsilon_words(total.epsilon, 3)}: "
        f"{parts_words(account, 3)}"
    )


def _labels(unit: str, delta: float, adjacency: str) -> str:
    return f"{unit}-level, delta={delta:g}, adjacency {adjacency}"


def _versions(client: MlflowClient, name: str) -> list[Any]:
    return [found for found in client.search_model_versions(f"name = '{name}'") if VERSION_TAG in found.tags]


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value not in (None, "", [], {}):
            yield f"{prefix}{key}", value
