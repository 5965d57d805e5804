"""Anatomies as tissue fractions on a regular grid, and the reader of whole-head label maps such as SynthSeg's."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from medfl_ray.data.phantoms.tissues import TISSUES
from medfl_ray.errors import LayoutError, UnreadableFile

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Tissue fractions 0..255 of shape [X, Y, Z, T]; axes run to the right, front and top (RAS)."""

    fractions: npt.NDArray[np.uint8]
    origin_mm: npt.NDArray[np.float64]  # of voxel 0, with the brain's centre at 0
    spacing_mm: float

    @cached_property
    def occupied(self) -> npt.NDArray[np.bool_]:
        """Where a voxel or one of its neighbours holds tissue; the rest is air."""
        return ndimage.binary_dilation(self.fractions.any(axis=-1), np.ones((3, 3, 3), bool))  # type: ignore[no-any-return]

    @cached_property
    def lesion_sites_mm(self) -> FloatArray:
        """Places [N, 3] where gliomas grow and stay visible: white matter with cerebrum all around it."""
        solid = self.fractions[..., :3].sum(axis=-1, dtype=np.float32)
        around = ndimage.uniform_filter(solid, size=max(3, round(22 / self.spacing_mm)))
        sites = np.argwhere((self.fractions[..., 0] > 128) & (around > 0.8 * 255)) * self.spacing_mm + self.origin_mm
        above = sites[(sites[:, 2] > -12) & (np.abs(sites[:, 0]) > 12)]
        return np.ascontiguousarray(above, dtype=np.float32)

    def sample(self, coordinates: Sequence[FloatArray]) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """Return fractions 0..1 [T, N] of the N places that are not air, and the mask of these places.

        Written out, because it reads all tissues of a corner at once: a third of the time of one call of
        `map_coordinates` per tissue.
        """
        shape = np.array(self.fractions.shape[:3])
        places = [
            (c - np.float32(o)) / np.float32(self.spacing_mm) for c, o in zip(coordinates, self.origin_mm, strict=True)
        ]
        nearest = [np.rint(place).astype(np.int32) for place in places]
        mask = np.logical_and.reduce([(i > 0) & (i < n - 1) for i, n in zip(nearest, shape, strict=True)])
        mask[mask] = self.occupied[nearest[0][mask], nearest[1][mask], nearest[2][mask]]
        inside = np.stack([place[mask] for place in places])
        low = np.floor(inside).astype(np.intp)
        offset = (inside - low).astype(np.float32)
        rows = self.fractions.reshape(-1, self.fractions.shape[3])
        strides = np.array([shape[1] * shape[2], shape[2], 1])
        start = strides @ low
        total = np.zeros((inside.shape[1], rows.shape[1]), dtype=np.float32)
        for corner in itertools.product((0, 1), repeat=3):
            weights = [offset[a] if step else 1 - offset[a] for a, step in enumerate(corner)]
            weight = weights[0] * weights[1] * weights[2] / np.float32(255)
            total += rows[start + int(strides @ np.array(corner))] * weight[:, None]
        return np.ascontiguousarray(total.T), mask


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


@lru_cache(maxsize=48)
def load_label_map(path: Path, spacing_mm: int) -> Anatomy:
    """Return one subject's label map at a whole number of millimetres per voxel.

    Raises:
      UnreadableFile: the map or its labels.json cannot be read.
      LayoutError: the map does not show a brain.
    """
    try:
        image = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call]
        labels = np.asarray(image.dataobj).astype(np.uint8)
        index = json.loads((path.parent / "labels.json").read_text())["index_to_freesurfer"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, ImageFileError) as error:
        raise UnreadableFile(
            f"cannot read label map {path.name!r}: {type(error).__name__}; expected NIfTI and labels.json"
        ) from None
    lookup = np.full(256, -1, dtype=np.int16)
    for key, freesurfer in index.items():
        name = FREESURFER_TISSUE.get(int(freesurfer))
        lookup[int(key)] = TISSUES.index(name) if name else -1
    tissue = lookup[labels]
    maps = {name: block_mean((tissue == i).astype(np.float32), spacing_mm) for i, name in enumerate(TISSUES)}
    cortex = np.argwhere(tissue == TISSUES.index("grey"))
    if not len(cortex) or not (tissue == TISSUES.index("white")).any():
        raise LayoutError(
            f"label map {path.name!r} has no cortex or no white matter; expected FreeSurfer labels of a head"
        )
    centre = (cortex.min(axis=0) + cortex.max(axis=0)) / 2
    return pack(maps, (spacing_mm - 1) / 2 - centre, spacing_mm)


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


def block_mean(array: FloatArray, factor: int) -> FloatArray:
    """Average over cubes of factor^3 voxels; the rest at the far end is dropped."""
    if factor == 1:
        return array
    a, b, c = (length // factor for length in array.shape)
    blocks = array[: a * factor, : b * factor, : c * factor].reshape(a, factor, b, factor, c, factor)
    means: FloatArray = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    return means


def pack(maps: Mapping[str, FloatArray], origin_mm: npt.NDArray[np.float64], spacing_mm: float) -> Anatomy:
    """Store fractions in bytes; where tissues sum to more than a voxel they share it."""
    shape = next(iter(maps.values())).shape
    stack = np.zeros((*shape, len(TISSUES)), dtype=np.uint8)
    total = np.maximum(sum(maps.values()), 1.0)
    for index, name in enumerate(TISSUES):
        if name in maps:
            stack[..., index] = np.rint(255 * np.clip(maps[name] / total, 0, 1))
    return Anatomy(stack, np.asarray(origin_mm, dtype=np.float64), float(spacing_mm))
