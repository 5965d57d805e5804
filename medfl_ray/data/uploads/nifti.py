"""A NIfTI file from somebody else: its header is checked before a voxel is allocated."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from medfl_ray.data.formats.nifti import NIFTI2_STARTS, read_nifti
from medfl_ray.data.uploads.limits import Grant, UploadLimits, check_ratio, check_shape, copy_exactly
from medfl_ray.data.volume import Volume
from medfl_ray.errors import UnreadableFile

NIFTI1_STARTS = ((348).to_bytes(4, "little"), (348).to_bytes(4, "big"))
NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
MAGIC = {NIFTI1_BYTES: (344, b"n+1\0"), NIFTI2_BYTES: (4, b"n+2\0")}
BYTES_PER_VOXEL = 12  # as stored, scaled, and with the channels first


def is_nifti(start: bytes) -> bool:
    """Whether a file starts as NIfTI-1 or NIfTI-2 does."""
    return start[:4] in NIFTI1_STARTS or start[:4] in NIFTI2_STARTS


def read_nifti_upload(path: Path, workspace: Path, limits: UploadLimits, grant: Grant) -> Volume:
    """Read a .nii or .nii.gz file whatever it is called; a compressed one is unpacked into `workspace`.

    Raises:
      UnreadableFile: the header makes no sense, claims too much, or does not fit the file's length.
    """
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        if not packed:
            with path.open("rb") as stream:
                needed, num_voxels = _needed_bytes(stream.read(NIFTI2_BYTES), limits)
            if path.stat().st_size < needed:
                raise UnreadableFile(
                    f"the file is truncated: its header needs {needed} bytes and {path.stat().st_size} are there"
                )
            plain = _called_nii(path, workspace)
        else:
            plain = workspace / "unpacked.nii"
            with gzip.open(path) as unpacked:
                needed, num_voxels = _needed_bytes(unpacked.read(NIFTI2_BYTES), limits)
                check_ratio(needed, path.stat().st_size, limits)
                grant(0)
                unpacked.seek(0)
                copy_exactly(cast(BinaryIO, unpacked), plain, needed)
        grant(num_voxels * BYTES_PER_VOXEL)
        return read_nifti(plain)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile(f"not a complete gzip file ({type(error).__name__}); copy it again") from None


def _called_nii(path: Path, workspace: Path) -> Path:
    """A name by which nibabel knows the format."""
    if path.name.lower().endswith(".nii"):
        return path
    link = workspace / "plain.nii"
    link.symlink_to(path.resolve())
    return link


def _needed_bytes(start: bytes, limits: UploadLimits) -> tuple[int, int]:
    """Return the bytes that a NIfTI header asks for, and its voxels."""
    if not is_nifti(start):
        raise UnreadableFile("the file is not NIfTI; expected NIfTI, NRRD, DICOM or a zip of DICOM files")
    size = NIFTI1_BYTES if start[:4] in NIFTI1_STARTS else NIFTI2_BYTES
    place, magic = MAGIC[size]
    if len(start) < size or start[place : place + 4] != magic:
        raise UnreadableFile(
            "the NIfTI header is truncated, or its voxels lie in another file; send one .nii or .nii.gz file"
        )
    kind: Any = nib.Nifti1Header if size == NIFTI1_BYTES else nib.Nifti2Header
    try:
        header = kind(start[:size], check=False)
        dtype = header.get_data_dtype()
    except (WrapStructError, HeaderDataError, ValueError, KeyError) as error:
        raise UnreadableFile(f"the NIfTI header is damaged ({type(error).__name__}); write it again") from None
    if dtype.names or dtype.kind == "c" or dtype.itemsize > 8:
        raise UnreadableFile(f"the NIfTI voxels are of type {dtype.name}; expected whole numbers, float32 or float64")
    _check_spacing(header)
    dimensions = [int(value) for value in header["dim"]]
    if not 2 <= dimensions[0] <= 5:
        raise UnreadableFile(f"the NIfTI header has {dimensions[0]} axes; expected 2, 3, or 4 with channels last")
    num_voxels = check_shape(tuple(dimensions[1 : 1 + dimensions[0]]), limits)
    return _offset(float(header["vox_offset"]), size, limits) + num_voxels * dtype.itemsize, num_voxels


def _check_spacing(header: Any) -> None:
    """Refuse spacings of nothing, which nibabel would take for a millimetre; an sform states them itself."""
    spacing = [float(value) for value in header["pixdim"][1:4]]
    if int(header["sform_code"]) <= 0 and not all(math.isfinite(value) and value for value in spacing):
        raise UnreadableFile("the NIfTI header has a voxel spacing of zero or nothing; correct it")


def _offset(value: float, header_bytes: int, limits: UploadLimits) -> int:
    if not math.isfinite(value) or not header_bytes <= value <= limits.max_header_bytes or value != np.floor(value):
        raise UnreadableFile(
            f"the NIfTI header puts the first voxel at byte {value:g}; expected {header_bytes + 4} or a little more"
        )
    return int(value)
