"""The scanner's voxel grid, and smooth random fields that do not depend on it.

A field is a lattice of random numbers in the scanner room (millimetres), read off with cubic B-splines;
so the same patient at 32 or 128 voxels has the same anatomy, lesion and bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.data.phantoms.preset import HospitalProfile

FloatArray = npt.NDArray[np.float32]
Triple = tuple[float, float, float]

# Where the head's centre lies, seen from the brain's.
HEAD_CENTRE_MM: Triple = (0.0, 5.0, -6.0)
LATTICE_REACH_MM = 130.0
# Array axis -> (axis in the room: 0 right, 1 front, 2 top; direction). The last array axis crosses the slices.
ARRAY_AXES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "axial": ((0, -1), (1, -1), (2, 1)),
    "coronal": ((0, -1), (2, -1), (1, 1)),
    "sagittal": ((1, -1), (2, -1), (0, 1)),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """An axis-aligned voxel grid: `lines_mm[a]` are the room coordinates along array axis a."""

    room_axes: tuple[int, int, int]
    lines_mm: tuple[FloatArray, FloatArray, FloatArray]
    affine: npt.NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each array axis."""
        return (len(self.lines_mm[0]), len(self.lines_mm[1]), len(self.lines_mm[2]))

    @property
    def spacing_mm(self) -> Triple:
        """Voxel spacing along each array axis."""
        norms = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(norms[0]), float(norms[1]), float(norms[2]))

    def room(self) -> list[FloatArray]:
        """Right, front and top coordinate of every voxel, each broadcastable to the shape."""
        coordinates: list[FloatArray] = [np.zeros(1, np.float32)] * 3
        for axis, room_axis in enumerate(self.room_axes):
            coordinates[room_axis] = self.lines_mm[axis].reshape([-1 if a == axis else 1 for a in range(3)])
        return coordinates


def scanner_grid(profile: HospitalProfile, size_voxels: int, slice_at_mm: float | None = None) -> Grid:
    """Return a hospital's grid of size_voxels^3, or the one axial slice at a height above the brain's centre."""
    axes = ARRAY_AXES["axial" if slice_at_mm is not None else profile.orientation]
    in_plane, across = (extent / size_voxels for extent in profile.field_of_view_mm)
    affine = np.eye(4)
    lines = []
    for axis, (room_axis, sign) in enumerate(axes):
        step = sign * (across if axis == 2 else in_plane)
        start = HEAD_CENTRE_MM[room_axis] - step * (size_voxels - 1) / 2
        count = size_voxels
        if axis == 2 and slice_at_mm is not None:
            start, count = slice_at_mm, 1
        affine[:3, axis] = 0
        affine[room_axis, axis] = step
        affine[room_axis, 3] = start
        lines.append((start + step * np.arange(count)).astype(np.float32))
    return Grid((axes[0][0], axes[1][0], axes[2][0]), (lines[0], lines[1], lines[2]), affine)


class SmoothField:
    """A smooth random field over the scanner room with unit variance in its middle."""

    def __init__(self, rng: np.random.Generator, wavelength_mm: float) -> None:
        self.num_nodes = int(np.ceil(2 * LATTICE_REACH_MM / wavelength_mm)) + 4
        self.step_mm = wavelength_mm
        shape = (self.num_nodes,) * 3
        # A cubic B-spline averages nodes; 0.479 is the root sum of squares of its weights, averaged over a cell.
        self.nodes = (rng.standard_normal(shape) / 0.479**1.5).astype(np.float32)

    def on(self, grid: Grid) -> FloatArray:
        """Values on a grid, in its shape."""
        values = self.nodes.transpose(grid.room_axes)
        for axis in range(3):
            basis = self._basis(grid.lines_mm[axis])
            values = np.moveaxis(np.tensordot(basis, values, axes=(1, axis)), 0, axis)
        return np.ascontiguousarray(values, dtype=np.float32)

    def _basis(self, line_mm: FloatArray) -> FloatArray:
        """Cubic B-spline weights [n, nodes] of every node at every coordinate."""
        position = (line_mm[:, None] + LATTICE_REACH_MM) / self.step_mm + 1 - np.arange(self.num_nodes)
        distance = np.abs(position)
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.clip(2 - distance, 0, None) ** 3 / 6
        weights: FloatArray = np.where(distance < 1, near, far).astype(np.float32)
        return weights


@dataclass(frozen=True, eq=False)
class Pose:
    """How a patient's head differs from the anatomy: an affine map and two scales of smooth displacement."""

    matrix: npt.NDArray[np.float64]
    shift_mm: npt.NDArray[np.float64]
    displacement: tuple[tuple[SmoothField, float], ...]

    def anatomy_coordinates(self, grid: Grid) -> list[FloatArray]:
        """Coordinates in the anatomy, in mm, of every voxel of a grid."""
        room = grid.room()
        coordinates = []
        for row in range(3):
            linear = sum(np.float32(self.matrix[row, k]) * room[k] for k in range(3)) + np.float32(self.shift_mm[row])
            coordinates.append(np.broadcast_to(linear, grid.shape).astype(np.float32))
        for index, (field, amplitude_mm) in enumerate(self.displacement):
            coordinates[index % 3] += np.float32(amplitude_mm) * field.on(grid)
        return coordinates

    def room_point(self, point_mm: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Where a place in the anatomy lies in the room, up to the few millimetres of smooth displacement."""
        return np.asarray(np.linalg.solve(self.matrix, point_mm - self.shift_mm), dtype=np.float64)


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draw head size, position and shape of one patient."""
    angles = np.deg2rad(rng.normal(0, (4.0, 2.5, 2.5)))  # nodding is the freest
    scale = rng.normal(1.0, 0.04) * np.exp(rng.normal(0, 0.025, 3))
    shear = np.eye(3) + np.triu(rng.normal(0, 0.02, (3, 3)), 1)
    matrix = _rotation(angles) @ shear @ np.diag(1 / scale)
    shift = rng.normal(0, (3.0, 3.0, 4.0))
    coarse = [(SmoothField(rng, 65.0), 3.0) for _ in range(3)]
    fine = [(SmoothField(rng, 28.0), 1.6) for _ in range(3)]
    return Pose(matrix, shift, tuple(coarse + fine))


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)
