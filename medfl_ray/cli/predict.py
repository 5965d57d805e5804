"""medfl-ray predict: one image through one model, without Ray and without a server."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from medfl_ray.errors import ConfigError
from medfl_ray.export.precision import VariantName

if TYPE_CHECKING:
    from medfl_ray.data.results.mask_files import MaskFormat
    from medfl_ray.data.uploads.read import Upload
    from medfl_ray.export.predictor import Predictor, Segmentation

ENDINGS = {".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "nrrd", ".dcm": "dicom-seg"}


class Format(StrEnum):
    """Formats of masks."""

    NIFTI = "nifti"
    NRRD = "nrrd"
    DICOM_SEG = "dicom-seg"
    RTSTRUCT = "rtstruct"


def predict(
    file: Annotated[Path, typer.Argument(help="NIfTI, NRRD or DICOM file, a zip of a DICOM series, or its folder.")],
    model: Annotated[str, typer.Option(help="Folder of a run or package, or NAME[@VERSION] of a registered model.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; mask.nii.gz, or segmentation.dcm for DICOM, when absent.")
    ] = None,
    format: Annotated[Format | None, typer.Option(help="Format of the mask; the output's ending when absent.")] = None,
    series: Annotated[
        list[str] | None, typer.Option(help="SeriesInstanceUID, where FILE holds several; repeat for channels.")
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Also write a picture of the mask over the image.")] = None,
    variant: Annotated[VariantName, typer.Option(help="Precision to run.")] = "float32",
    registry: Annotated[str | None, typer.Option(help="Folder or URL of the registry.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; all cores when absent.")] = None,
) -> None:
    """Write the mask of one image on the image's own grid, or print its class probabilities."""
    from medfl_ray.data.results.mask_files import check_writable
    from medfl_ray.data.uploads.limits import UploadLimits
    from medfl_ray.data.uploads.read import opened_upload

    with tempfile.TemporaryDirectory(prefix="medfl-predict-") as folder:
        predictor = _open(model, registry, variant, threads or _cores(), Path(folder))
        with opened_upload(file, UploadLimits(), tuple(series or ())) as upload:
            if predictor.description.task == "classification":
                _show_classes(predictor.classify(upload.volume))
                return
            chosen = _format(format, output, upload)
            check_writable(upload, chosen)
            result = _segment(predictor, upload)
            _write(result, upload, chosen, output or Path(_default_name(chosen)), overlay)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(model: str, registry: str | None, variant: VariantName, threads: int, scratch: Path) -> Predictor:
    """Load a model from a folder, or a checked copy of it from the registry.

    Raises:
      ConfigError: there is neither a folder nor a registered model of that name.
    """
    from medfl_ray.export.onnx_session import OnnxModel
    from medfl_ray.export.predictor import Predictor

    package, version = Path(model), ""
    if not package.is_dir():
        package, version = _fetch(model, registry, scratch / "package")
    return Predictor(OnnxModel.open(package, variant, threads), version)


def _fetch(model: str, registry: str | None, into: Path) -> tuple[Path, str]:
    from medfl_ray.store.registry.registry import Registry

    name, _, version = model.partition("@")
    if not name or "/" in model:
        raise ConfigError(f"there is no folder {Path(model).name!r}; name a run, a package or a registered model")
    books = Registry(registry)
    found = books.get(name, version or "champion")
    return books.fetch(found, into), str(found.version)


def _format(format: Format | None, output: Path | None, upload: Upload) -> MaskFormat:
    """The format that is asked for by name or ending; DICOM-SEG for DICOM and NIfTI for others where neither says."""
    if format is not None:
        return format.value
    if output is None:
        return "dicom-seg" if upload.kind == "dicom" else "nifti"
    name = output.name.lower()
    for ending, found in ENDINGS.items():
        if name.endswith(ending):
            return cast("MaskFormat", found)
    raise ConfigError(f"the ending of {output.name!r} says no format; expected {', '.join(ENDINGS)}, or give --format")


def _default_name(format: MaskFormat) -> str:
    return {"nifti": "mask.nii.gz", "nrrd": "mask.seg.nrrd", "dicom-seg": "segmentation.dcm"}.get(
        format, "structures.dcm"
    )


def _segment(predictor: Predictor, upload: Upload) -> Segmentation:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("windows"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows", total=1.0)
        return predictor.segment(upload.volume, lambda fraction: bar.update(task, completed=fraction))


def _write(result: Segmentation, upload: Upload, format: MaskFormat, output: Path, overlay: Path | None) -> None:
    from medfl_ray.data.results.mask_files import MaskOrigin, write_mask

    origin = MaskOrigin(result.model, result.version or "1")
    _save(output, write_mask(result.mask, upload, result.labels, format, origin))
    typer.echo(f"mask      {output}")
    if overlay is not None:
        from medfl_ray.analytics.overlay import overlay_png

        _save(overlay, overlay_png(upload.volume, result.mask, result.labels))
        typer.echo(f"overlay   {overlay}")
    for name, millilitres in result.volumes_ml.items():
        typer.echo(f"volume    {name}: {millilitres:.2f} ml")
    for note in upload.volume.notes:
        typer.echo(f"note      {note}")


def _save(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path.name!r}: {error.strerror}; choose another place for it") from None


def _show_classes(probabilities: dict[str, float]) -> None:
    for name, value in sorted(probabilities.items(), key=lambda item: -item[1]):
        typer.echo(f"class     {name}: {value:.4f}")
