"""Masks as files that viewers lay over the image they came from: NIfTI, NRRD, DICOM-SEG and RTSTRUCT."""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt

from medfl_ray.data.uploads.read import Upload
from medfl_ray.data.volume import LPS_TO_RAS, Volume
from medfl_ray.errors import DataError, GeometryError, MedflError

Mask = npt.NDArray[np.uint8]
MaskFormat = Literal["nifti", "nrrd", "dicom-seg", "rtstruct"]
MASK_FORMATS: tuple[MaskFormat, ...] = get_args(MaskFormat)
DICOM_FORMATS = ("dicom-seg", "rtstruct")
ENDINGS: dict[MaskFormat, str] = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "dicom-seg": ".dcm", "rtstruct": ".dcm"}
MEDIA_TYPES: dict[MaskFormat, str] = {
    "nifti": "application/gzip", "nrrd": "application/octet-stream",
    "dicom-seg": "application/dicom", "rtstruct": "application/dicom",
}  # fmt: skip


@dataclass(frozen=True)
class MaskOrigin:
    """The model that drew a mask, as DICOM objects name it."""

    model: str = "model"
    version: str = "1"


def write_mask(
    mask: Mask,
    upload: Upload,
    labels: Mapping[int, str],
    format: MaskFormat,
    origin: MaskOrigin | None = None,
) -> bytes:
    """Write a mask on the grid of its image.

    Args:
      mask: label values [*S], S the image's voxels.
      labels: names of the values above 0.

    Raises:
      GeometryError: the mask does not have the image's shape.
      DataError: a DICOM object is asked for and the image was not DICOM, or lacks what such an object refers to.
    """
    check_writable(upload, format)
    if mask.shape != upload.volume.spatial_shape:
        raise GeometryError(
            f"the mask has shape {mask.shape}, its image {upload.volume.spatial_shape}; they must be equal"
        )
    named = {value: name for value, name in sorted(labels.items()) if value > 0}
    if format == "nifti":
        return _nifti(mask, upload.volume)
    if format == "nrrd":
        return _nrrd(mask, upload.volume, named)
    try:
        return _dicom_object(mask, upload, named, format, origin or MaskOrigin())
    except MedflError:
        raise
    except Exception as error:  # noqa: BLE001 - values of strangers' headers fail anywhere in an object's making
        raise DataError(
            f"the images lack what a {format} object must state ({type(error).__name__}); ask for nifti"
        ) from None


def _dicom_object(
    mask: Mask, upload: Upload, labels: Mapping[int, str], format: MaskFormat, origin: MaskOrigin
) -> bytes:
    if format == "dicom-seg":
        from medfl_ray.data.results.write_seg import write_segmentation

        return write_segmentation(mask, upload, labels, origin)
    from medfl_ray.data.results.write_rtstruct import write_structure_set

    return write_structure_set(mask, upload, labels, origin)


def check_writable(upload: Upload, format: MaskFormat) -> None:
    """Refuse a format before a model runs for nothing.

    Raises:
      DataError: a DICOM object is asked for and the image was not DICOM.
    """
    if format not in MASK_FORMATS:
        raise DataError(f"the format {str(format)[:20]!r} is unknown; expected one of {', '.join(MASK_FORMATS)}")
    if format in DICOM_FORMATS and upload.kind != "dicom":
        raise DataError(
            f"{format} refers to the DICOM images it was drawn on, and the upload is {upload.kind}; "
            "send the DICOM series, or ask for nifti or nrrd"
        )


def _three_axes(mask: Mask) -> Mask:
    return mask if mask.ndim == 3 else mask[..., None]


def _nifti(mask: Mask, volume: Volume) -> bytes:
    image: Any = nib.Nifti1Image(_three_axes(mask), volume.affine, dtype=np.uint8)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    image.header.set_sform(volume.affine, code="scanner")
    # A qform cannot shear; readers that look at it first must not see another place than those that read the sform.
    image.header.set_qform(volume.affine, code="scanner")
    if not np.allclose(image.header.get_qform(), volume.affine, atol=1e-3):
        image.header.set_qform(volume.affine, code="unknown")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _nrrd(mask: Mask, volume: Volume, labels: Mapping[int, str]) -> bytes:
    """A .seg.nrrd: Slicer shows its segments by name; other readers see a label map."""
    placed = LPS_TO_RAS @ volume.affine
    header: dict[str, object] = {
        "type": "uint8", "space": "left-posterior-superior", "kinds": ["domain"] * 3, "encoding": "gzip",
        "space directions": placed[:3, :3].T, "space origin": placed[:3, 3],
    }  # fmt: skip
    for place, (value, name) in enumerate(labels.items()):
        header[f"Segment{place}_ID"] = f"Segment_{value}"
        header[f"Segment{place}_Name"] = " ".join(name.split())
        header[f"Segment{place}_LabelValue"] = str(value)
        header[f"Segment{place}_Layer"] = "0"
    buffer = io.BytesIO()
    nrrd.write(buffer, np.asfortranarray(_three_axes(mask)), header, index_order="F", compression_level=4)
    return buffer.getvalue()
