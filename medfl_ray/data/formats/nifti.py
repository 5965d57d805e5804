"""NIfTI images."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import FileBasedImage, ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError

from medfl_ray.data.volume import Volume
from medfl_ray.errors import DataError, GeometryError, UnreadableFile

MIN_PLANE = 4096
NIFTI2_STARTS = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))


def read_nifti(path: Path) -> Volume:
    """Read a .nii or .nii.gz file; a fourth (or fifth) axis becomes the channels.

    Raises:
      UnreadableFile: the file is truncated, not NIfTI, or has colour voxels.
      GeometryError: the axes or the affine make no sense.
    """
    try:
        image = _open(path)
        if not isinstance(image, SpatialImage):
            raise UnreadableFile("the file holds no volume; expected a NIfTI image")
        if image.get_data_dtype().names:
            raise UnreadableFile("the NIfTI voxels are colours; expected one number per voxel and channel")
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit float32 is refused as infinite
            channels = _channels_first(_stored(image.dataobj))
    except (EOFError, OSError, zlib.error, ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        if isinstance(error, (DataError, FileNotFoundError, PermissionError)):
            raise
        raise UnreadableFile(
            f"not a complete NIfTI file ({type(error).__name__}); copy it again from its source"
        ) from None
    return Volume(channels, np.asarray(image.affine, dtype=np.float64))


def _open(path: Path) -> FileBasedImage:
    """Open a file; a compressed one is read to its end, because its checksum stands there."""
    if not path.name.lower().endswith(".gz"):
        return nib.load(path)
    raw = gzip.decompress(path.read_bytes())
    kind = nib.Nifti2Image if raw[:4] in NIFTI2_STARTS else nib.Nifti1Image
    return kind.from_bytes(raw)


def _stored(dataobj: Any) -> np.ndarray:
    """Return the voxels as the file has them, where nothing scales them; else scaled, as float32."""
    if isinstance(dataobj, ArrayProxy) and dataobj.slope == 1 and dataobj.inter == 0:
        return np.asarray(dataobj.get_unscaled())  # type: ignore[no-untyped-call]
    return np.asarray(dataobj, dtype=np.float32)


def _channels_first(values: np.ndarray) -> np.ndarray:
    """Return [X, Y, Z], with or without channels at the end, as float32 [C, X, Y, Z]."""
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[:, :, :, 0]
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4:
        raise GeometryError(f"the NIfTI file has {values.ndim} axes; expected 2, 3, or 4 with channels last")
    source = np.moveaxis(values, 3, 0)
    first = np.empty(source.shape, dtype=np.float32)
    if source.shape[1] * source.shape[3] < MIN_PLANE:  # a stranger's header may have a million planes of one voxel
        first[...] = source
        return first
    for row in range(source.shape[2]):  # x is the fastest axis there and the slowest here: plane by plane
        first[:, :, row] = source[:, :, row]
    return first
