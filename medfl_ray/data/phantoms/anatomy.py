"""Real anatomies as tissue fractions on a regular grid, read once per process.

Two sources: the MNI152 tissue maps that nilearn ships (a brain; skull, scalp, eyes, face and neck are
built around it from distances and a few ellipsoids), and whole-head label maps as SynthSeg's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medfl_ray.data.phantoms.tissues import TISSUES
from medfl_ray.errors import LayoutError, UnreadableFile

FloatArray = npt.NDArray[np.float32]
Coordinates = tuple[FloatArray, FloatArray, FloatArray]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Tissue fractions 0..255 of shape [T, X, Y, Z]; axes run to the right, front and top (RAS)."""

    fractions: npt.NDArray[np.uint8]
    origin_mm: npt.NDArray[np.float64]  # of voxel 0, with the brain's centre at 0
    spacing_mm: float
    lesion_sites_mm: FloatArray  # [N, 3], deep in the cerebrum


@lru_cache(maxsize=4)
def load_template(spacing_mm: int) -> Anatomy:
    """Return the MNI152 head at a whole number of millimetres per voxel."""
    white, grey = _mni_map("wm", spacing_mm), _mni_map("gm", spacing_mm)
    brain = ndimage.binary_fill_holes(_mni_map("t1", spacing_mm) > 0.05).astype(np.float32)
    x, y, z = _axes_mm(white.shape, spacing_mm)
    deep = _ellipsoid((x, y, z), (0, -6, 4), (38, 40, 24))
    head = _head_around(brain, (x, y, z), spacing_mm)
    white, grey = _sharpen(white, grey, brain)
    maps = {
        "white": white,
        "grey": grey * (1 - deep),
        "deep_grey": grey * deep,
        "csf": np.clip(brain - white - grey, 0, 1),
    }
    for name, fraction in head.items():
        maps[name] = maps.get(name, 0) + fraction
    # The brain's centre lies here in MNI coordinates; phantoms are centred on it.
    return _pack(maps, np.array([x.flat[0], y.flat[0], z.flat[0]]) - (0.0, -18.0, 8.0), spacing_mm)


def _mni_map(kind: str, spacing_mm: int) -> FloatArray:
    """One of nilearn's 1 mm maps, padded to a head and averaged over blocks; importing nilearn takes seconds."""
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    path = folder / "datasets" / "data" / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise UnreadableFile(f"nilearn does not hold {path.name}, the head of the phantoms; install nilearn>=0.11")
    array = np.asarray(nib.load(path).dataobj, dtype=np.float32) / 255  # type: ignore[attr-defined]
    return _block_mean(np.pad(array, MNI_PADDING), spacing_mm)


MNI_ORIGIN = (-98.0, -134.0, -72.0)
MNI_PADDING = ((12, 12), (16, 26), (58, 22))


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


def _ellipsoid(axes: Coordinates, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> FloatArray:
    distance = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True))
    return np.clip((1.08 - np.sqrt(distance)) / 0.16, 0, 1).astype(np.float32)


def _head_around(brain: FloatArray, axes: Coordinates, spacing_mm: int) -> dict[str, FloatArray]:
    """Meninges, skull, scalp, eyes, face and neck around a brain mask, as fractions that fill what is free."""
    x, y, z = axes
    reach = 9.0 / spacing_mm
    grown = ndimage.distance_transform_edt(brain < 0.5) <= reach
    closed = ndimage.distance_transform_edt(grown) > reach
    inside = 0.5 - ndimage.distance_transform_edt(closed)
    outside = ndimage.distance_transform_edt(~closed) - 0.5
    depth = (np.where(closed, inside, outside) * spacing_mm).astype(np.float32)  # mm outside the meninges
    shell = _ramp(spacing_mm)
    vault = np.clip((z + 48) / 12, 0, 1)
    free = 1 - brain
    head: dict[str, FloatArray] = {}

    def fill(name: str, amount: FloatArray) -> None:
        nonlocal free
        part = np.clip(amount, 0, 1) * free
        head[name] = head.get(name, np.float32(0)) + part
        free = free - part

    for side in (-1, 1):
        fill("eye", _ellipsoid(axes, (side * 33, 64, -37), (12, 12, 12)))
    fill("csf", _ellipsoid(axes, (0, -46, -95), (10, 10, 40)) - _ellipsoid(axes, (0, -46, -95), (6, 6, 38)))
    fill("white", _ellipsoid(axes, (0, -46, -95), (6, 6, 38)))
    sinus = shell(depth, -3, 6) * np.clip((4.5 - np.abs(x)) / 2, 0, 1) * np.clip((z + 20) / 10, 0, 1)
    fill("vessel", sinus * np.clip((40 - y) / 20, 0, 1))
    fill("csf", shell(depth, -99, 2.0) * np.clip((z + 74) / 6, 0, 1))
    air = _ellipsoid(axes, (0, 64, -62), (9, 22, 26)) + _ellipsoid(axes, (0, 30, -52), (11, 12, 9))
    air = air + _ellipsoid(axes, (-28, 55, -66), (11, 13, 13)) + _ellipsoid(axes, (28, 55, -66), (11, 13, 13))
    air = air + _ellipsoid(axes, (0, 82, -10), (15, 4, 11))
    cavity = np.clip(air, 0, 1) * (depth > 1.5)
    free = free * (1 - cavity)
    fill("bone", shell(depth, 2.0, 4.0) * vault)
    fill("marrow", shell(depth, 4.0, 6.5) * vault)
    fill("bone", shell(depth, 6.5, 8.5) * vault)
    fill("fat", shell(depth, 8.5, 12.5) * vault)
    fill("muscle", shell(depth, 12.5, 14.5) * vault)
    _fill_face(fill, axes)
    return head


def _fill_face(fill: Callable[[str, FloatArray], None], axes: Coordinates) -> None:
    """Orbits, jaw and neck: muscle inside a coat of fat and skin, marrow in the jaw and skull base."""
    for side in (-1, 1):
        fill("fat", _ellipsoid(axes, (side * 30, 56, -37), (19, 24, 16)))
        fill("muscle", _ellipsoid(axes, (side * 62, 12, -42), (11, 30, 32)))
    fill("marrow", _ellipsoid(axes, (0, 8, -52), (20, 22, 12)))
    fill("bone", _ellipsoid(axes, (0, -46, -100), (17, 17, 40)))
    face = np.maximum(_ellipsoid(axes, (0, 32, -76), (62, 54, 58)), _ellipsoid(axes, (0, -40, -100), (60, 64, 62)))
    inner = np.maximum(_ellipsoid(axes, (0, 28, -78), (52, 45, 56)), _ellipsoid(axes, (0, -38, -100), (50, 54, 62)))
    fill("muscle", inner * 0.8)
    fill("fat", face)


def _ramp(spacing_mm: float) -> Callable[[FloatArray, float, float], FloatArray]:
    """Return a function: the fraction of a voxel that lies between two depths."""

    def shell(depth: FloatArray, inner: float, outer: float) -> FloatArray:
        rise = np.clip((depth - inner) / spacing_mm + 0.5, 0, 1)
        fall = np.clip((outer - depth) / spacing_mm + 0.5, 0, 1)
        return np.minimum(rise, fall).astype(np.float32)

    return shell


@lru_cache(maxsize=2)
def list_label_maps(folder: Path) -> tuple[Path, ...]:
    """Return the label maps of a folder in name order.

    Raises:
      LayoutError: the folder holds no label map or no labels.json.
    """
    maps = tuple(sorted(folder.glob("*.nii.gz"))) or tuple(sorted(folder.glob("*.nii")))
    if not maps or not (folder / "labels.json").is_file():
        raise LayoutError(
            f"the label map folder {folder.name!r} holds {len(maps)} NIfTI files"
            f"{'' if (folder / 'labels.json').is_file() else ' and no labels.json'}; expected both"
        )
    return maps


@lru_cache(maxsize=24)
def load_label_map(path: Path, spacing_mm: int) -> Anatomy:
    """Return one subject's label map at a whole number of millimetres per voxel.

    Raises:
      UnreadableFile: the map or its labels.json cannot be read.
    """
    try:
        image = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call,attr-defined]
        labels = np.asarray(image.dataobj).astype(np.uint8)
        index = json.loads((path.parent / "labels.json").read_text())["index_to_freesurfer"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UnreadableFile(
            f"cannot read label map {path.name!r}: {type(error).__name__}; expected NIfTI and labels.json"
        ) from None
    lookup = np.full(256, -1, dtype=np.int16)
    for key, freesurfer in index.items():
        name = FREESURFER_TISSUE.get(int(freesurfer))
        lookup[int(key)] = TISSUES.index(name) if name else -1
    tissue = lookup[labels]
    maps = {name: _block_mean((tissue == i).astype(np.float32), spacing_mm) for i, name in enumerate(TISSUES)}
    brain = np.argwhere((tissue >= 0) & (tissue <= 2))
    centre = (brain.min(axis=0) + brain.max(axis=0)) / 2
    return _pack(maps, (spacing_mm - 1) / 2 - centre, spacing_mm)


FREESURFER_TISSUE: dict[int, str] = (
    dict.fromkeys((2, 41, 7, 46, 16, 28, 60, 85, 502), "white")
    | dict.fromkeys((3, 42, 8, 47, 17, 53, 18, 54), "grey")
    | dict.fromkeys((10, 49, 11, 50, 12, 51, 13, 52, 26, 58, 25, 57), "deep_grey")
    | dict.fromkeys((4, 43, 5, 44, 14, 15, 24, 72), "csf")
    | dict.fromkeys((30, 62, 508), "vessel")
    | dict.fromkeys((515, 516, 514), "bone")
    | dict.fromkeys((507,), "fat")
    | dict.fromkeys((509, 511, 512, 530), "muscle")
    | {506: "eye", 136: "grey", 137: "grey", 163: "grey", 164: "grey"}
)


def _block_mean(array: FloatArray, factor: int) -> FloatArray:
    """Average over cubes of factor^3 voxels; the rest at the far end is dropped."""
    if factor == 1:
        return array
    a, b, c = (length // factor for length in array.shape)
    blocks = array[: a * factor, : b * factor, : c * factor].reshape(a, factor, b, factor, c, factor)
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def _pack(maps: dict[str, FloatArray], origin_mm: npt.NDArray[np.float64], spacing_mm: float) -> Anatomy:
    shape = next(iter(maps.values())).shape
    stack = np.zeros((len(TISSUES), *shape), dtype=np.uint8)
    total = np.maximum(sum(maps.values()), 1.0)
    for index, name in enumerate(TISSUES):
        if name in maps:
            stack[index] = np.rint(255 * np.clip(maps[name] / total, 0, 1))
    origin = np.asarray(origin_mm, dtype=np.float64)
    return Anatomy(stack, origin, float(spacing_mm), _lesion_sites(stack, origin, spacing_mm))


def _lesion_sites(
    fractions: npt.NDArray[np.uint8], origin_mm: npt.NDArray[np.float64], spacing_mm: float
) -> FloatArray:
    """White matter of the hemispheres with brain all around it: where gliomas grow and stay visible."""
    solid = fractions[:3].sum(axis=0, dtype=np.float32)
    around = ndimage.uniform_filter(solid, size=max(3, round(22 / spacing_mm)))
    sites = np.argwhere((fractions[0] > 128) & (around > 0.8 * 255)) * spacing_mm + origin_mm
    above = sites[(sites[:, 2] > -12) & (np.abs(sites[:, 0]) > 12)]
    return np.ascontiguousarray(above, dtype=np.float32)
