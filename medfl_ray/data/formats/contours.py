"""RTSTRUCT contours filled to masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medfl_ray.data.volume import LPS_TO_RAS, Volume
from medfl_ray.errors import GeometryError, LabelError

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]


def fill_regions(dataset: Dataset, values: Mapping[int, int], reference: Volume) -> dict[int, Mask]:
    """Fill each region's closed contours; a contour inside another one of its region cuts a hole.

    A voxel belongs to a region when its centre lies inside. Contours between slices go to the nearest one.

    Raises:
      GeometryError: a region lies outside the image or is not drawn along its slices.
      LabelError: no region has a closed contour.
    """
    if len(reference.spatial_shape) != 3:
        raise GeometryError("RTSTRUCT contours need an image with a place in the patient; this one is a plain picture")
    to_voxels = np.linalg.inv(reference.affine) @ LPS_TO_RAS
    masks: dict[int, Mask] = {}
    num_contours = num_outside = 0
    for number, points_mm in _contours(dataset):
        if number not in values:
            continue
        num_contours += 1
        voxels = (to_voxels @ np.column_stack([points_mm, np.ones(len(points_mm))]).T)[:3].T
        mask = masks.setdefault(number, np.zeros(reference.spatial_shape, dtype=bool))
        num_outside += not _fill(mask, voxels)
    if not num_contours:
        raise LabelError(
            "the RTSTRUCT object has no closed contour of the regions in data.labels; draw them, or correct the names"
        )
    if num_outside:
        raise GeometryError(
            f"{num_outside} of {num_contours} contours lie outside the image or beside its slices; the RTSTRUCT "
            "belongs to another series"
        )
    return masks


def _contours(dataset: Dataset) -> Iterator[tuple[int, Points]]:
    """Yield (region number, points in LPS mm [N, 3]) of every closed planar contour."""
    for region in dataset.get("ROIContourSequence") or []:
        for contour in region.get("ContourSequence") or []:
            kind = str(contour.get("ContourGeometricType", "CLOSED_PLANAR"))
            data = contour.get("ContourData") or []
            if not kind.startswith("CLOSED_PLANAR") and kind != "CLOSEDPLANAR_XOR":
                continue
            if len(data) < 9 or len(data) % 3:
                raise LabelError(
                    f"a contour has {len(data)} numbers; expected x, y, z of at least 3 points. Export the RTSTRUCT "
                    "again"
                )
            yield int(region.ReferencedROINumber), np.array([float(v) for v in data]).reshape(-1, 3)


def _fill(mask: Mask, voxels: Points) -> bool:
    """Toggle the voxels inside one contour [N, 3]; False when it is not on a slice of the mask."""
    from matplotlib.path import Path as Polygon

    spread = np.ptp(voxels, axis=0)
    axis = int(np.argmin(spread))
    if spread[axis] > 0.5:
        raise GeometryError(
            "a contour is not drawn along a plane of the image; resample the image or redraw the contour"
        )
    level = round(float(voxels[:, axis].mean()))
    outline = np.delete(voxels, axis, axis=1)
    plane = mask.take(level, axis) if 0 <= level < mask.shape[axis] else None
    if plane is None:
        return False
    low = np.floor(outline.min(axis=0)).astype(int)
    high = np.ceil(outline.max(axis=0)).astype(int) + 1
    if (low < -1).any() or (high > np.array(plane.shape) + 1).any():
        return False
    low, high = np.maximum(low, 0), np.minimum(high, plane.shape)
    rows, columns = np.mgrid[low[0] : high[0], low[1] : high[1]]
    inside = Polygon(outline).contains_points(np.column_stack([rows.ravel(), columns.ravel()]))
    index: list[slice | int] = [slice(low[0], high[0]), slice(low[1], high[1])]
    index.insert(axis, level)
    mask[tuple(index)] ^= inside.reshape(rows.shape)
    return True
