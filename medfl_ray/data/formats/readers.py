"""One reader for every image format: path in, `Volume` out.

Messages of this package do not name the file, because file names often hold a patient's identifier;
the caller says which case it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medfl_ray.data.volume import Volume, same_grid
from medfl_ray.errors import GeometryError, LabelError, UnreadableFile

NIFTI = (".nii", ".nii.gz")
NRRD = (".nrrd", ".nhdr")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
IMAGE_ENDINGS = (*NIFTI, *NRRD, *PICTURES)


def read_volume(path: Path, series_uid: str = "") -> Volume:
    """Read an image of any known format.

    Args:
      path: a file, or a folder with one DICOM image series.
      series_uid: which series of the folder to read, where it holds several.

    Raises:
      UnreadableFile: missing, forbidden, truncated or of an unknown format.
      GeometryError: the image's axes, slices or affine make no sense.
    """
    return _read(path, series_uid, as_label=False)


def read_series_files(files: Sequence[Path]) -> Volume:
    """Read one DICOM series from its files, wherever they lie.

    Raises:
      UnreadableFile, GeometryError: as of `read_volume`.
    """
    from medfl_ray.data.formats.dicom_series import read_series

    with _plain_errors():
        return read_series(files)[0]


def read_label(
    path: Path, reference: Volume, labels: Mapping[int, str] | None = None, by_name_alone: bool = False
) -> Volume:
    """Read a label volume [1, *S] on the grid of its image; values are whole numbers.

    Args:
      path: an image file, or a DICOM SEG or RTSTRUCT object.
      reference: the image as `read_volume` gave it.
      labels: names of the values; segments and regions of DICOM objects are matched to them by name.
      by_name_alone: match none of them by number where no name fits.

    Raises:
      LabelError: values that are not whole numbers, or no region that is asked for.
      GeometryError: the label does not lie on the image's grid.
    """
    kind = _kind(path)
    if kind == "dicom":
        from medfl_ray.data.formats.dicom_labels import read_dicom_label

        with _plain_errors():
            return read_dicom_label(path, reference, labels or {}, by_name_alone)
    label = _read(path, "", as_label=True)
    if label.array.shape[0] != 1:
        raise LabelError(f"the label has {label.array.shape[0]} channels; expected one whole number per voxel")
    if not np.array_equal(label.array, np.rint(label.array)):
        raise LabelError("the label has values that are not whole numbers; it may be an image or a probability map")
    label = _fit_dimensions(label, reference)
    if label.spatial_shape != reference.spatial_shape:
        raise GeometryError(
            f"the label has shape {label.spatial_shape}, its image {reference.spatial_shape}; they must be equal"
        )
    if not same_grid(label, reference):
        raise GeometryError(
            "the label lies elsewhere in space than its image (their affines differ by more than a fifth of a voxel); "
            "resample the label to the image's grid"
        )
    return label


def _fit_dimensions(label: Volume, reference: Volume) -> Volume:
    """Lay a 2D picture of labels on a one-slice volume, whose position in space a picture cannot state."""
    if len(label.spatial_shape) == 2 and reference.spatial_shape == (*label.spatial_shape, 1):
        return Volume(label.array[..., None], reference.affine, label.notes)
    if len(label.spatial_shape) == 2 and len(reference.spatial_shape) == 2:
        return Volume(label.array, reference.affine, label.notes)
    return label


def _kind(path: Path) -> str:
    name = path.name.lower()
    for kind, endings in (("nifti", NIFTI), ("nrrd", NRRD), ("picture", PICTURES)):
        if name.endswith(endings):
            return kind
    return "dicom"


def _read(path: Path, series_uid: str, as_label: bool) -> Volume:
    with _plain_errors():
        kind = _kind(path)
        if kind == "nifti":
            from medfl_ray.data.formats.nifti import read_nifti

            return read_nifti(path)
        if kind == "nrrd":
            from medfl_ray.data.formats.nrrd import read_nrrd

            return read_nrrd(path)
        if kind == "picture":
            from medfl_ray.data.formats.pictures import read_picture

            return read_picture(path, as_label)
        from medfl_ray.data.formats.dicom_series import read_dicom

        return read_dicom(path, series_uid)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UnreadableFile("the file does not exist; check the path in the case list") from None
    except PermissionError:
        raise UnreadableFile("the file may not be read by this user; change its permissions") from None
    except OSError as error:
        raise UnreadableFile(
            f"the file cannot be read ({error.strerror or type(error).__name__}); check the disk"
        ) from None
    except MemoryError:
        raise UnreadableFile("the image does not fit into memory; its header may be damaged") from None
