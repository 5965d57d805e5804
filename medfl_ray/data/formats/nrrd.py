"""NRRD images."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import numpy.typing as npt

from medfl_ray.data.volume import Affine, Volume
from medfl_ray.errors import GeometryError, UnreadableFile

# Sign of our RAS axes in each space that NRRD names.
SPACES = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
CHANNEL_KINDS = {"list", "vector", "covariant-vector", "point", "scalar", "RGB-color", "RGBA-color", "3-vector"}


def read_nrrd(path: Path) -> Volume:
    """Read a .nrrd file, or a .nhdr file beside its data; one axis without direction becomes the channels.

    Raises:
      UnreadableFile: the file is truncated or not NRRD.
      GeometryError: the space or the directions make no sense.
    """
    try:
        values, header = nrrd.read(str(path), index_order="F")
    except (nrrd.NRRDError, ValueError, KeyError, EOFError, zlib.error, OSError, IndexError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise UnreadableFile(
            f"not a complete NRRD file ({type(error).__name__}); copy it again from its source"
        ) from None
    return volume_from(values, header)


def volume_from(values: npt.NDArray[Any], header: dict[str, Any]) -> Volume:
    """Place voxels [*axes of the file] by their NRRD header.

    Raises:
      GeometryError: the space or the directions make no sense.
    """
    axis = _channel_axis(header, values.ndim)
    array = values[None] if axis is None else np.moveaxis(values, axis, 0)
    return Volume(np.ascontiguousarray(array, dtype=np.float32), _affine(header, axis, array.ndim - 1))


def _channel_axis(header: dict[str, Any], num_axes: int) -> int | None:
    """The axis that is not a direction in space."""
    directions, kinds = header.get("space directions"), header.get("kinds", [])
    if directions is not None:
        axes = [i for i, row in enumerate(np.atleast_2d(directions)) if not np.isfinite(row).any()]
    else:
        axes = [i for i, kind in enumerate(kinds) if kind in CHANNEL_KINDS]
    if len(axes) > 1 or num_axes - len(axes) not in (2, 3):
        raise GeometryError(
            f"the NRRD file has {num_axes} axes of which {len(axes)} are channels; expected 2 or 3 in space, at most "
            "1 of channels"
        )
    return axes[0] if axes else None


def _affine(header: dict[str, Any], channel_axis: int | None, num_axes: int) -> Affine:
    affine: Affine = np.eye(4)
    directions = header.get("space directions")
    if directions is None:
        spacings = [s for i, s in enumerate(header.get("spacings", [])) if i != channel_axis]
        for axis, spacing in enumerate(spacings[:num_axes]):
            affine[axis, axis] = spacing if np.isfinite(spacing) else 1.0
        return affine
    rows = [row for i, row in enumerate(np.atleast_2d(directions)) if i != channel_axis]
    space = str(header.get("space", "right-anterior-superior")).lower()
    if len(rows[0]) == 2:
        affine[:2, :2] = np.array(rows, dtype=np.float64).T
        return affine
    if space not in SPACES:
        raise GeometryError(f"the NRRD space is {space!r}; expected one of {', '.join(s for s in SPACES if '-' in s)}")
    signs = np.array(SPACES[space], dtype=np.float64)
    for axis, row in enumerate(rows):
        affine[:3, axis] = signs * np.asarray(row, dtype=np.float64)
    affine[:3, 3] = signs * np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
    return affine
