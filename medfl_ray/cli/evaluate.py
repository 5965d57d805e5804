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


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[Path, typer.Option(help="Folder of labelled images.")],
    format: Annotated[Layout, typer.Option(help="Layout of the folder.")] = Layout.AUTO,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Score a run's model on every labelled case of a folder: Dice per label, or AUC and accuracy."""
    from medfl_ray.data.fingerprints import fingerprint_of
    from medfl_ray.data.labelled_folder import open_labelled_folder
    from medfl_ray.export.package import load_run, open_public_data, read_package
    from medfl_ray.export.weights import load_weights
    from medfl_ray.training.evaluation import summarise
    from medfl_ray.training.intervals import bootstrap_intervals
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
