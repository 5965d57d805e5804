"""medfl-ray export: write a run's model package, its variants and a MONAI bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.errors import ConfigError

if TYPE_CHECKING:
    from medfl_ray.export.calibration import CalibrationFolder
    from medfl_ray.export.onnx_export import Exported


class Precision(StrEnum):
    """Variants to write in addition to float32."""

    FLOAT16 = "float16"
    INT8 = "int8"


class OpenData(StrEnum):
    """Declarations under which images may shape what is released."""

    PUBLIC = "public"
    SYNTHETIC = "synthetic"


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    variants: Annotated[
        list[Precision] | None, typer.Option("--variants", help="Write this variant as well; may be given twice.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Labelled images to calibrate and measure on; never of private patients.")
    ] = None,
    declared: Annotated[OpenData | None, typer.Option(help="What the images of --calibration are.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Also write a MONAI bundle into this new folder.")] = None,
) -> None:
    """Write a run's model package again: ONNX checked against the weights, variants, model card."""
    from medfl_ray.export.onnx_export import export_run

    folder = _calibration(calibration, declared)
    exported = export_run(run, [variant.value for variant in variants or ()], folder)
    _show(run, exported)
    if bundle is not None:
        from medfl_ray.export.monai_bundle import write_bundle

        write_bundle(run, bundle)
        typer.echo(f"bundle    {bundle}")


def _calibration(directory: Path | None, declared: OpenData | None) -> CalibrationFolder | None:
    from medfl_ray.export.calibration import CalibrationFolder

    if directory is None:
        if declared is not None:
            raise ConfigError("--declared says what the images of --calibration are; give both or neither")
        return None
    if declared is None:
        raise ConfigError(
            "ranges of the images of --calibration are released with the model; say with --declared public or "
            "--declared synthetic that they may be"
        )
    return CalibrationFolder(directory, declared.value)


def _show(run: Path, exported: Exported) -> None:
    parity = exported.parity
    typer.echo(f"model     {run / 'model.onnx'}")
    typer.echo(
        f"parity    largest difference {parity.max_abs_difference:.2g}, labels equal {parity.agreement:.3%}, "
        f"Dice {parity.dice:.4f} ({parity.num_patches} patches of {parity.images})"
    )
    for name, variant in exported.description.variants.items():
        if name != "float32":
            loss = f"Dice lost {variant.dice_loss:.4f} against float32"
            if variant.truth_loss is not None:
                loss += f", {variant.truth_loss:.4f} against the true labels"
            typer.echo(f"{name:<10}{variant.file}: {loss}; {variant.speed:.2f} x its speed ({variant.images})")
    typer.echo(f"card      {run / 'card.md'}")
