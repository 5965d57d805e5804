"""A medical image in memory: voxels and where they are in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import DataError, GeometryError

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

# DICOM and NRRD count millimetres towards the patient's left and back, we towards right and front.
LPS_TO_RAS: Affine = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Volume:
    """An image [C, *S] with the affine from voxel index to RAS millimetres; S has 2 or 3 axes.

    Column a of the affine belongs to array axis a. Of a 2D picture only the first two columns carry
    spacing. `notes` state the repairs that reading needed.
    """

    array: Array = field(repr=False)
    affine: Affine
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no later step could use."""
        check_affine(self.affine)
        if self.array.ndim not in (3, 4):
            raise GeometryError(f"the image has {self.array.ndim - 1} spatial axes; expected 2 or 3")
        if self.array.size == 0:
            raise GeometryError(f"the image has no voxels (shape {self.array.shape}); the file is empty")
        # Both ends carry a NaN on, and need no second array as large as the image.
        if not (np.isfinite(self.array.min()) and np.isfinite(self.array.max())):
            bad = int(self.array.size - np.isfinite(self.array).sum())
            raise DataError(f"{bad} of {self.array.size} voxels are NaN or infinite; replace them before training")

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(self.array.shape[1:])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each array axis."""
        return spacing_of(self.affine, len(self.spatial_shape))


def without_voxels(volume: Volume) -> Volume:
    """Return a volume of the same grid and one channel that holds no memory: every voxel is the same zero."""
    zeros = np.broadcast_to(np.zeros((), dtype=np.float32), (1, *volume.spatial_shape))
    return Volume(zeros, volume.affine, volume.notes)


def spacing_of(affine: Affine, num_axes: int) -> tuple[float, ...]:
    """Return the voxel spacing in mm along the first axes of an affine."""
    return tuple(float(np.linalg.norm(affine[:3, axis])) for axis in range(num_axes))


def check_affine(affine: Affine) -> None:
    """Refuse an affine that is not 4x4, not finite, or maps two voxels to one point.

    Raises:
      GeometryError: with the spacing that was found.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise GeometryError("the image's position in space is not a finite 4x4 matrix; rewrite its header")
    spacing = spacing_of(affine, 3)
    if min(spacing) <= 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * np.prod(spacing):
        shown = " x ".join(f"{s:g}" for s in spacing)
        raise GeometryError(
            f"the voxel spacing is {shown} mm with a singular direction matrix; correct the image's header"
        )


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes have the same voxels at the same places, up to a fifth of a voxel."""
    if a.spatial_shape != b.spatial_shape:
        return False
    num_axes = len(a.spatial_shape)
    shape = (*a.spatial_shape, *([1] * (3 - num_axes)))
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    points = np.vstack([corners, np.ones((1, corners.shape[1]))])
    shift = np.linalg.norm(((a.affine - b.affine) @ points)[:3], axis=0)
    return bool(shift.max() <= 0.2 * min(a.spacing_mm))
