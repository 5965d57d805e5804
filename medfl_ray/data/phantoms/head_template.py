"""The MNI152 brain that nilearn ships, with meninges, skull, scalp, eyes, face and neck built around it.

The brain is real (the average of 152 people, sharpened); what lies around it is made of distances from
the brain and a few ellipsoids, which is enough for the outline and the brightness of a head in MR.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medfl_ray.data.phantoms.anatomy import Anatomy, FloatArray, block_mean, pack
from medfl_ray.errors import UnreadableFile

Triple = tuple[float, float, float]
Coordinates = tuple[FloatArray, FloatArray, FloatArray]

MNI_ORIGIN: Triple = (-98.0, -134.0, -72.0)
MNI_PADDING = ((12, 12), (16, 26), (58, 22))
BRAIN_CENTRE: Triple = (0.0, -18.0, 10.0)


@lru_cache(maxsize=5)
def load_template(spacing_mm: int) -> Anatomy:
    """Return the MNI152 head at a whole number of millimetres per voxel.

    Raises:
      UnreadableFile: nilearn does not hold the maps.
    """
    white, grey = _mni_map("wm", spacing_mm), _mni_map("gm", spacing_mm)
    brain = ndimage.binary_fill_holes(_mni_map("t1", spacing_mm) > 0.05).astype(np.float32)
    axes = _axes_mm(white.shape, spacing_mm)
    deep = _ellipsoid(axes, (0, -6, 4), (38, 40, 24))
    white, grey = _sharpen(white, grey, brain)
    head = _Head(axes, spacing_mm, brain)
    head.maps |= {
        "white": white,
        "grey": grey * (1 - deep),
        "deep_grey": grey * deep,
        "csf": np.clip(brain - white - grey, 0, 1),
    }
    head.build()
    return pack(head.maps, np.array([axis.flat[0] for axis in axes]) - BRAIN_CENTRE, spacing_mm)


def _mni_map(kind: str, spacing_mm: int) -> FloatArray:
    """One of nilearn's 1 mm maps, padded to a head and averaged over blocks; importing nilearn takes seconds."""
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    path = folder / "datasets" / "data" / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise UnreadableFile(f"nilearn does not hold {path.name}, the brain of the phantoms; install nilearn>=0.11")
    image: Any = nib.load(path)
    array = np.asarray(image.dataobj, dtype=np.float32) / 255
    return block_mean(np.pad(array, MNI_PADDING), spacing_mm)


def _axes_mm(shape: tuple[int, ...], spacing_mm: int) -> Coordinates:
    """MNI coordinates of the padded, averaged grid, each broadcastable to [X, Y, Z]."""
    axes = []
    for axis, length in enumerate(shape):
        start = MNI_ORIGIN[axis] - MNI_PADDING[axis][0] + (spacing_mm - 1) / 2
        line = (start + spacing_mm * np.arange(length)).astype(np.float32)
        axes.append(line.reshape([-1 if a == axis else 1 for a in range(3)]))
    return axes[0], axes[1], axes[2]


def _sharpen(white: FloatArray, grey: FloatArray, brain: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Make the average of 152 brains look like one: raise the likelier tissue."""
    fluid = np.clip(brain - white - grey, 0, 1) * 1.15
    total = white**2 + grey**2 + fluid**2 + 1e-6
    return brain * white**2 / total, brain * grey**2 / total


def _ellipsoid(axes: Coordinates, centre: Triple, radii: Triple) -> FloatArray:
    """Fraction inside an ellipsoid with a slightly soft edge."""
    distance = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True))
    inside: FloatArray = np.clip((1.08 - np.sqrt(distance)) / 0.16, 0, 1).astype(np.float32)
    return inside


def _depth_outside(mask: npt.NDArray[np.bool_], reach_mm: float, spacing_mm: int) -> FloatArray:
    """Signed distance in mm, positive outside, from a mask whose gaps up to twice the reach are closed."""
    grown = ndimage.distance_transform_edt(~mask) <= reach_mm / spacing_mm
    closed = ndimage.distance_transform_edt(grown) > reach_mm / spacing_mm
    inside = 0.5 - ndimage.distance_transform_edt(closed)
    outside = ndimage.distance_transform_edt(~closed) - 0.5
    depth: FloatArray = (np.where(closed, inside, outside) * spacing_mm).astype(np.float32)
    return depth


class _Head:
    """Fills what the brain leaves free, tissue by tissue; what comes first keeps its place."""

    def __init__(self, axes: Coordinates, spacing_mm: int, brain: FloatArray) -> None:
        self.axes, self.spacing_mm = axes, spacing_mm
        self.free = 1 - brain
        self.maps: dict[str, FloatArray] = {}
        self.meninges = _depth_outside(brain > 0.5, 9.0, spacing_mm)
        # The scalp is smoother than the skull: a wider closing, with muscle in the temples between the two.
        self.scalp = _depth_outside(brain > 0.5, 40.0, spacing_mm)

    def build(self) -> None:
        x, y, z = self.axes
        for side in (-1, 1):
            self.fill("eye", _ellipsoid(self.axes, (side * 33, 63, -37), (12, 12, 12)))
        self._fill_neck_canal()
        sinus = self.between(self.meninges, -3, 6) * np.clip((4.5 - np.abs(x)) / 2, 0, 1) * np.clip((z + 20) / 10, 0, 1)
        self.fill("vessel", sinus * np.clip((40 - y) / 20, 0, 1))
        self.fill("csf", self.between(self.meninges, -99, 2.0) * np.clip((z + 74) / 6, 0, 1))
        self._carve_air()
        vault = np.clip((z + 48) / 12, 0, 1)
        for tissue, inner, outer in (("bone", 2.0, 3.5), ("marrow", 3.5, 6.0), ("bone", 6.0, 7.5)):
            self.fill(tissue, self.between(self.meninges, inner, outer) * vault)
        self._fill_face()
        within = np.clip((z + 62) / 16, 0, 1)
        self.fill("muscle", self.between(self.scalp, -99, 7.5) * within)
        self.fill("fat", self.between(self.scalp, 7.5, 12.0) * within)
        self.fill("muscle", self.between(self.scalp, 12.0, 13.5) * within)

    def fill(self, tissue: str, amount: npt.NDArray[np.floating]) -> None:
        """Give a tissue a share of every voxel, as far as the voxel is free."""
        part = np.clip(amount, 0, 1).astype(np.float32) * self.free
        self.maps[tissue] = self.maps[tissue] + part if tissue in self.maps else part
        self.free = self.free - part

    def between(self, depth: FloatArray, inner: float, outer: float) -> FloatArray:
        """Fraction of each voxel that lies between two depths in mm."""
        rise = np.clip((depth - inner) / self.spacing_mm + 0.5, 0, 1)
        fall = np.clip((outer - depth) / self.spacing_mm + 0.5, 0, 1)
        return np.minimum(rise, fall).astype(np.float32)

    def _fill_neck_canal(self) -> None:
        cord = _ellipsoid(self.axes, (0, -46, -95), (5.5, 5.5, 38))
        self.fill("white", cord)
        self.fill("csf", _ellipsoid(self.axes, (0, -46, -95), (9, 9, 40)))

    def _carve_air(self) -> None:
        """Nose, sphenoid, maxillary and frontal sinuses, and the throat."""
        spaces: tuple[tuple[Triple, Triple], ...] = (
            ((0, 66, -60), (8, 22, 22)),
            ((0, 32, -50), (11, 12, 9)),
            ((-27, 56, -64), (11, 13, 12)),
            ((27, 56, -64), (11, 13, 12)),
            ((0, 77, -14), (15, 4, 9)),
            ((0, 2, -98), (8, 7, 34)),
        )
        for centre, radii in spaces:
            self.free = self.free * (1 - _ellipsoid(self.axes, centre, radii) * (self.meninges > 1.5))

    def _fill_face(self) -> None:
        """Orbits, skull base, vertebrae, jaw and neck: muscle inside a coat of fat and skin."""
        axes = self.axes
        for side in (-1, 1):
            self.fill("fat", _ellipsoid(axes, (side * 31, 53, -37), (17, 24, 15)))
            self.fill("marrow", _ellipsoid(axes, (side * 44, -38, -52), (9, 12, 14)) * 0.6)
            self.fill("fat", _ellipsoid(axes, (side * 47, 40, -72), (9, 18, 20)) * 0.7)
            self.fill("marrow", _ellipsoid(axes, (side * 44, 22, -88), (5, 20, 22)))
        self.fill("marrow", _ellipsoid(axes, (0, 6, -52), (19, 22, 12)))
        self.fill("marrow", _ellipsoid(axes, (0, -30, -105), (14, 9, 34)) * 0.7)
        self.fill("bone", _ellipsoid(axes, (0, -58, -104), (12, 8, 36)) * 0.8)
        outer = ((0.0, 30.0, -72.0), (64.0, 57.0, 62.0)), ((0.0, -36.0, -100.0), (60.0, 60.0, 66.0))
        face = np.maximum(*(_ellipsoid(axes, centre, radii) for centre, radii in outer))
        inner = np.maximum(*(_ellipsoid(axes, centre, (r[0] - 8, r[1] - 8, r[2] - 2)) for centre, r in outer))
        skin = np.maximum(*(_ellipsoid(axes, centre, (r[0] - 2, r[1] - 2, r[2])) for centre, r in outer))
        self.fill("muscle", inner * 0.85)
        self.fill("fat", skin)
        self.fill("muscle", face * 0.8)
