"""Write one phantom as NIfTI, NRRD or PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medfl_ray.data.phantoms.render import Phantom

Stored = npt.NDArray[Any]
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def as_volume(phantom: Phantom) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return the image with three spatial axes [C, I, J, K] and its affine; a slice gets one voxel of depth."""
    if phantom.image.ndim == 3:
        return phantom.image[..., None], phantom.affine
    return phantom.image, phantom.affine


def write_array(
    path: Path, array: npt.NDArray[np.float32] | npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]
) -> None:
    """Write an array [I, J, K] or, several channels in one file, [C, I, J, K]; the ending names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = array.astype(np.uint8 if array.dtype == np.uint8 else np.int32 if array.max() > 32767 else np.int16)
    if path.name.endswith(".nrrd"):
        _write_nrrd(path, stored, affine)
    elif path.name.endswith(".png"):
        _write_png(path, stored)
    else:
        _write_nifti(path, stored, affine)


def _write_nifti(path: Path, array: Stored, affine: npt.NDArray[np.float64]) -> None:
    channels_last = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
    image = nib.Nifti1Image(channels_last, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    image.set_sform(affine, code="scanner")  # type: ignore[no-untyped-call]
    image.set_qform(affine, code="scanner")  # type: ignore[no-untyped-call]
    nib.save(image, path)


def _write_nrrd(path: Path, array: Stored, affine: npt.NDArray[np.float64]) -> None:
    import nrrd

    placed = RAS_TO_LPS @ affine
    directions = [placed[:3, axis].tolist() for axis in range(3)]
    kinds = ["domain"] * 3
    if array.ndim == 4:
        directions.insert(0, [np.nan] * 3)
        kinds.insert(0, "list")
    header = {
        "space": "left-posterior-superior",
        "space directions": np.array(directions),
        "space origin": placed[:3, 3],
        "kinds": kinds,
        "encoding": "gzip",
    }
    nrrd.write(str(path), array, header, index_order="F")


def _write_png(path: Path, array: Stored) -> None:
    """Write a slice as a 16-bit picture, or as an 8-bit one where the values allow."""
    from PIL import Image

    plane = np.squeeze(array)
    Image.fromarray(plane.astype(np.uint8 if array.dtype == np.uint8 else np.uint16)).save(path)
