"""medfl-ray models bundle: a MONAI bundle's weights as first weights of a run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer


class Origin(StrEnum):
    """What the bundle's training data were."""

    PUBLIC = "public"
    SYNTHETIC = "synthetic"


def from_bundle(
    config: Annotated[Path, typer.Argument(help="YAML file of a run with model.bundle.")],
    bundle: Annotated[Path, typer.Option(help="Folder of the MONAI bundle.")],
    origin: Annotated[Origin, typer.Option(help="What its training data were; you answer for that.")],
    source: Annotated[str, typer.Option(help="Where the bundle comes from, for the manifest.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("bundle_weights.safetensors"),
) -> None:
    """Write a MONAI bundle's weights as first weights of a run; they cost no epsilon where no patient shaped them."""
    from medfl_ray.config.files import load_run_config
    from medfl_ray.export.bundle_weights import take_bundle_weights

    kind: Literal["public", "synthetic"] = "public" if origin is Origin.PUBLIC else "synthetic"
    manifest = take_bundle_weights(load_run_config(config), bundle, out, kind, source)
    typer.echo(f"weights   {out}")
    typer.echo(f"sha256    {manifest.sha256}")
    typer.echo("next: set training.initial_weights in the configuration of the run")
