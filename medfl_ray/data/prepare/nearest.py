"""Labels carried from one grid to another: each voxel takes the nearest one's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]
NOTHING = 1e-9


def take_nearest(labels: Labels, matrix: Matrix, offset: Matrix, shape: tuple[int, ...]) -> Labels:
    """Return labels on another grid; voxel i there lies at `matrix @ i + offset` here.

    What lies outside takes the outermost label: two grids of one image differ there by half a voxel at most.
    """
    used = np.abs(matrix) > NOTHING * np.abs(matrix).max()
    if (used.sum(axis=0) == 1).all() and (used.sum(axis=1) == 1).all():
        return _along_axes(labels, matrix, offset, shape)
    from scipy.ndimage import affine_transform

    taken: Labels = affine_transform(labels, matrix, offset, output_shape=shape, order=0, mode="nearest")
    return taken


def _along_axes(labels: Labels, matrix: Matrix, offset: Matrix, shape: tuple[int, ...]) -> Labels:
    """Take whole planes, where the axes of both grids are parallel."""
    there = [int(axis) for axis in np.abs(matrix).argmax(axis=1)]
    taken = labels
    for here, axis in enumerate(there):
        nearest = np.floor(matrix[here, axis] * np.arange(shape[axis]) + offset[here] + 0.5).astype(np.intp)
        taken = taken.take(np.clip(nearest, 0, labels.shape[here] - 1), axis=here)
    return np.ascontiguousarray(taken.transpose(np.argsort(there)))
