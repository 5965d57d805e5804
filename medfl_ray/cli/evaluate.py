"""medfl-ray evaluate: score a run's model on a folder of labelled images."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from medfl_ray.errors import ConfigError


class Layout(StrEnum):
    """Layouts of a folder of images."""

    AUTO = "auto"
    DECATHLON = "decathlon"
    NNUNET = "nnunet"
    MANIFEST = "manifest"
    DICOM = "dicom"


class Contributions(StrEnum):
    """Ways to estimate a hospital's contribution."""

    LEAVE_ONE_OUT = "leave_one_out"
    SHAPLEY = "shapley"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[Path | None, typer.Option(help="Folder of labelled images.")] = None,
    format: Annotated[Layout, typer.Option(help="Layout of the folder.")] = Layout.AUTO,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --data: also write the figures to this file.")
    ] = None,
    cross_site: Annotated[
        bool, typer.Option("--cross-site", help="Score each hospital's own model on every hospital of the run.")
    ] = False,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="For each hospital, train without it and score that on it.")
    ] = False,
    contributions: Annotated[
        Contributions | None, typer.Option(help="Estimate what each hospital adds to the pooled score.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="For the studies: a Ray cluster to join.")] = None,
) -> None:
    """Score a run's model on a folder of images, or do studies among the run's own hospitals that it did not do."""
    studies = cross_site or leave_one_out or contributions is not None
    if (data is None) == (not studies):
        raise ConfigError(
            "give either --data with a folder of labelled images, or studies among the run's own hospitals: "
            "--cross-site, --leave-one-out, --contributions"
        )
    if data is None:
        study(run, cross_site, leave_one_out, contributions.value if contributions is not None else None, ray_address)
    else:
        score_folder(run, data, format, json_file)


def study(
    path: Path, cross_site: bool, leave_one_out: bool, contributions: str | None, ray_address: str | None
) -> None:
    """Do further studies of a finished run; what an earlier call finished is neither trained nor charged again.

    Raises:
      ConfigError: the run is not finished, or lacks hospitals.
      PrivacyConfigError: differential privacy keeps the scores that a study needs.
    """
    from medfl_ray.analytics.report import write_report
    from medfl_ray.cli.run import train_folder
    from medfl_ray.config.compatibility import study_problem
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.federation.studies.checks import check_studies
    from medfl_ray.store.run.folder import RunFolder

    folder = RunFolder.open(path)
    with folder.locked():
        if not (path / "model.safetensors").is_file():
            raise ConfigError(
                f"run {path.name!r} is not finished: end it with medfl-ray run --resume, then evaluate it"
            )
        asked: dict[str, Any] = {}
        if cross_site:
            asked["cross_site"] = True
        if leave_one_out:
            asked["leave_one_out"] = True
        if contributions is not None:
            asked["contributions"] = contributions
        evaluation = folder.run.evaluation.model_copy(update=asked)
        wanted = folder.run.model_copy(update={"evaluation": evaluation})
        problem = study_problem(
            evaluation, wanted.federation, wanted.privacy, wanted.aggregation, wanted.attack, wanted.data.task
        )
        if problem is not None:
            raise ConfigError(problem)
        check_studies(wanted, list_hospitals(wanted))
        folder.save_evaluation(evaluation)
        train_folder(folder, ray_address, dashboard=False)
        report = write_report(path)
    typer.echo(f"tables    {path / 'tables'}")
    typer.echo(f"pictures  {path / 'figures'}")
    typer.echo(f"report    {report}")


def score_folder(run: Path, data: Path, format: Layout, json_file: Path | None) -> None:
    """Score a run's model on every labelled case of a folder: Dice per label, or AUC and accuracy."""
    from medfl_ray.data.fingerprints import fingerprint_of
    from medfl_ray.data.layouts.labelled_folder import open_labelled_folder
    from medfl_ray.export.package import load_run, open_public_data, read_package
    from medfl_ray.export.weights import load_weights
    from medfl_ray.training.scoring.evaluation import summarise
    from medfl_ray.training.scoring.intervals import bootstrap_intervals
    from medfl_ray.training.trainer import Trainer

    config = load_run(run)
    package = read_package(run, config, open_public_data(config))
    folder = open_labelled_folder(data, format.value, package.task, package.preprocessing, package.labels)
    trainer = Trainer(
        package.model,
        config.training,
        package.task,
        package.spatial_dims,
        package.num_channels,
        package.out_channels,
        package.patch_size,
        for_dp=False,
    )
    weights = load_weights(run / "model.safetensors", trainer.layout)
    scores = trainer.score_cases(weights, folder.holdout, folder.labels)
    report = {
        "patients": folder.num_patients,
        "cases": len(folder.holdout),
        "figures": summarise(scores),
        "intervals_95": bootstrap_intervals(scores),
    }
    if json_file is not None:
        _write(json_file, {**report, "images": fingerprint_of(folder.cases).digest})
    _show(report, folder.num_unlabelled)


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path.name!r}: {error.strerror}; choose another place for --json") from None


def _show(report: dict[str, Any], num_unlabelled: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "mean", "95 % interval over patients")
    for name, value in report["figures"].items():
        low, high = report["intervals_95"][name]
        table.add_row(name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    console = Console()
    console.print(table)
    console.print(f"{report['patients']} patients, {report['cases']} cases", highlight=False)
    if num_unlabelled:
        console.print(f"{num_unlabelled} cases without a label were left out", highlight=False)
