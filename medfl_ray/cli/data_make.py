"""`medfl-ray data make`: render a data set of synthetic head MR."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class FileFormat(StrEnum):
    """Formats of the images."""

    NIFTI = "nifti"
    NRRD = "nrrd"
    PNG = "png"
    DICOM = "dicom"


class Layout(StrEnum):
    """Layouts of the folder."""

    DECATHLON = "decathlon"
    NNUNET = "nnunet"
    MANIFEST = "manifest"


def make(
    out: Annotated[Path, typer.Argument(help="New or empty folder to write into.")],
    preset: Annotated[str, typer.Option(help="Name of a phantom preset, or a YAML file.")] = "brain_tumour",
    hospitals: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of hospitals, each with its own scanner.")
    ] = 4,
    patients: Annotated[int, typer.Option(min=1, max=100_000, help="Patients per hospital.")] = 10,
    size: Annotated[int, typer.Option(min=16, max=256, help="Edge length in voxels.")] = 64,
    file_format: Annotated[FileFormat, typer.Option("--format", help="Format of the images.")] = FileFormat.NIFTI,
    layout: Annotated[
        Layout | None, typer.Option(help="Layout of the folder; manifest for DICOM and classes, else decathlon.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed renders the same images.")] = 0,
    labelmaps: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Whole-head label maps to render instead of MNI152."),
    ] = None,
    truth: Annotated[
        bool, typer.Option("--truth", help="Also write the exact truth, before annotators' habits.")
    ] = False,
) -> None:
    """Render synthetic head MR with tumours and exact truth, and write it as a data set."""
    from rich.console import Console
    from rich.progress import track

    from medfl_ray.data.phantoms.preset import load_preset
    from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms

    chosen = load_preset(preset)
    if layout is None:
        to_manifest = file_format is FileFormat.DICOM or chosen.task == "classification"
        layout = Layout.MANIFEST if to_manifest else Layout.DECATHLON
    phantoms = phantom_set(
        chosen,
        num_hospitals=hospitals,
        num_patients=patients,
        size_voxels=size,
        seed=seed,
        labelmaps=labelmaps,
        file_format=file_format.value,
        layout=layout.value,
        keep_truth=truth,
    )
    console = Console()
    total = hospitals * patients
    for _ in track(write_phantoms(out, phantoms), "Rendering", total=total, console=console):
        pass
    console.print(
        f"wrote {total} patients of {hospitals} hospitals to {out} ({layout.value}, {file_format.value}); synthetic"
    )
    console.print(f"next: medfl-ray data inspect {out}")
