"""medfl-ray export: write a run's model as ONNX, with its parity check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(run: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write model.onnx and model.json of a run again, checked against its weights."""
    from medfl_ray.export.onnx_export import export_run

    parity = export_run(run)
    typer.echo(f"model     {run / 'model.onnx'}")
    typer.echo(
        f"parity    largest difference {parity.max_abs_difference:.2g}, labels equal {parity.agreement:.3%}, "
        f"Dice {parity.dice:.4f} ({parity.num_patches} patches of {parity.images})"
    )
