"""Crops around one structure of public label maps, as images of scanners that do not exist (no patient, no epsilon).

Labels become intensities drawn anew for every crop (SynthSeg, Billot et al. 2023, doi:10.1016/j.media.2023.102789);
shape, blur, bias field and noise are drawn as well. All lengths are voxels of 1 mm.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from medfl_ray.config.pretrain import CropsConfig
from medfl_ray.data.phantoms.anatomy import FREESURFER_TISSUE, list_label_maps
from medfl_ray.data.phantoms.geometry import FloatArray, Grid, Pose, SmoothField
from medfl_ray.data.phantoms.tissues import BRIGHTNESS
from medfl_ray.data.prepare.placement import normalise
from medfl_ray.errors import LayoutError, UnreadableFile

Labels = npt.NDArray[np.int16]
Classes = npt.NDArray[np.uint8]
SURROUNDINGS = 30  # Voxels kept round the structure; more than the largest margin and displacement together.
REACH = 14  # Voxels rendered round the structure before the crop is cut.
SHORTEST = 0.7  # A structure shorter than this share of the usual length is damaged or not fully labelled.
AIR = 0.02


@dataclass(frozen=True, eq=False)
class Surroundings:
    """FreeSurfer labels [X, Y, Z] (right, front, top) round one structure, and the structure's own index."""

    labels: Labels
    structure: int


def load_structures(folder: Path, structures: tuple[int, ...]) -> tuple[Surroundings, ...]:
    """Cut the structure out of every label map of a folder, each side apart; unusually short ones are left out.

    Raises:
      LayoutError: the folder has no label maps, or none shows the structure.
      UnreadableFile: a map or labels.json cannot be read.
    """
    found = [part for path in list_label_maps(folder) for part in _cut_out(path, structures)]
    if not found:
        raise LayoutError(
            f"no label map of {folder.name!r} shows a structure with the FreeSurfer index {list(structures)}; "
            "correct crops.structures"
        )
    lengths = [part.labels.shape[1] - 2 * SURROUNDINGS for part in found]
    usual = float(np.median(lengths))
    return tuple(part for part, length in zip(found, lengths, strict=True) if length >= SHORTEST * usual)


def _cut_out(path: Path, structures: tuple[int, ...]) -> list[Surroundings]:
    try:
        image = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call]
        indices = np.asarray(image.dataobj).astype(np.uint8)
        names = json.loads((path.parent / "labels.json").read_text())["index_to_freesurfer"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, ImageFileError) as error:
        raise UnreadableFile(
            f"cannot read label map {path.name!r}: {type(error).__name__}; expected NIfTI and labels.json"
        ) from None
    lookup = np.zeros(256, dtype=np.int16)
    for key, freesurfer in names.items():
        lookup[int(key)] = int(freesurfer)
    labels = np.pad(lookup[indices], SURROUNDINGS)
    parts = []
    for structure in structures:
        places = np.argwhere(labels == structure)
        if len(places):
            low, high = places.min(axis=0) - SURROUNDINGS, places.max(axis=0) + SURROUNDINGS + 1
            window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            parts.append(Surroundings(np.ascontiguousarray(labels[window]), structure))
    return parts


def draw_crop(
    structures: tuple[Surroundings, ...], config: CropsConfig, rng: np.random.Generator
) -> tuple[FloatArray, Classes]:
    """Make up one examination: image [1, X, Y, Z], normalised, and classes [X, Y, Z]; 1 is the structure's front."""
    chosen = structures[int(rng.integers(len(structures)))]
    labels = chosen.labels[::-1] if rng.random() < 0.5 else chosen.labels
    deformed = _deform(labels, chosen.structure, rng)
    window = _window(deformed == chosen.structure, config.margin_voxels, rng)
    cropped = deformed[window]
    image = _acquire(_paint(cropped, chosen.structure, config.random_contrast, rng), rng)
    return normalise(image[None], config.intensity, None), _classes(cropped == chosen.structure, config, rng)


def _deform(labels: Labels, structure: int, rng: np.random.Generator) -> Labels:
    """Read the labels at places that are turned, stretched and bent at random."""
    shape = tuple(length - 2 * (SURROUNDINGS - REACH) for length in labels.shape)
    lines = [(np.arange(n) - (n - 1) / 2).astype(np.float32) for n in shape]
    grid = Grid((0, 1, 2), (lines[0], lines[1], lines[2]), np.eye(4))
    angles = np.deg2rad(rng.normal(0, (10.0, 6.0, 6.0)))
    stretch = np.diag(np.exp(rng.normal(0.05, 0.07) + rng.normal(0, 0.06, 3)))
    shear = np.eye(3) + np.triu(rng.normal(0, 0.04, (3, 3)), 1)
    bends = [(SmoothField(rng, 32.0), 1.5) for _ in range(3)] + [(SmoothField(rng, 14.0), 0.6) for _ in range(3)]
    pose = Pose(_rotation(angles) @ shear @ stretch, np.zeros(3), tuple(bends))
    centre = [(n - 1) / 2 for n in labels.shape]
    index = [
        np.clip(np.rint(c + middle), 0, n - 1).astype(np.int32)
        for c, middle, n in zip(pose.anatomy_coordinates(grid), centre, labels.shape, strict=True)
    ]
    deformed: Labels = labels[index[0], index[1], index[2]]
    return deformed if (deformed == structure).any() else labels


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    from scipy.spatial.transform import Rotation

    matrix: npt.NDArray[np.float64] = Rotation.from_euler("xyz", angles).as_matrix()
    return matrix


def _window(inside: npt.NDArray[np.bool_], margin: tuple[int, int], rng: np.random.Generator) -> tuple[slice, ...]:
    window = []
    for axis, length in enumerate(inside.shape):
        present = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        before, after = rng.integers(margin[0], margin[1] + 1, 2)
        window.append(slice(max(0, int(present[0] - before)), min(length, int(present[-1] + 1 + after))))
    return tuple(window)


def _paint(labels: Labels, structure: int, random_contrast: float, rng: np.random.Generator) -> FloatArray:
    """Give every label a mean and a texture: of T1-weighted MR with some freedom, or any."""
    free = rng.random() < random_contrast
    warmth = {name: value + rng.normal(0, 0.05) for name, value in BRIGHTNESS["T1"].items()}
    present, places = np.unique(labels, return_inverse=True)
    means = np.empty(len(present), dtype=np.float32)
    spreads = np.empty(len(present), dtype=np.float32)
    texture = rng.uniform(0.01, 0.08)
    for position, label in enumerate(present):
        tissue = "grey" if label == structure else FREESURFER_TISSUE.get(int(label))
        usual = AIR if tissue is None else warmth[tissue] + rng.normal(0, 0.03)
        means[position] = rng.uniform(0, 1) if free else max(usual, 0.0)
        spreads[position] = texture * rng.uniform(0.5, 1.5)
    grain = ndimage.gaussian_filter(rng.standard_normal(labels.shape, dtype=np.float32), rng.uniform(0.5, 1.2))
    grain /= grain.std()
    places = places.reshape(labels.shape)
    painted: FloatArray = means[places] + spreads[places] * grain
    return painted


def _acquire(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Blur, shade, bend the grey scale and add noise, as a scanner and its reconstruction do."""
    blurred = ndimage.gaussian_filter(image, rng.uniform(0.3, 1.0) * rng.uniform(0.7, 1.3, 3))
    lines = [(np.arange(n) - (n - 1) / 2).astype(np.float32) for n in image.shape]
    grid = Grid((0, 1, 2), (lines[0], lines[1], lines[2]), np.eye(4))
    bias = np.exp(np.float32(rng.uniform(0, 0.2)) * SmoothField(rng, 50.0).on(grid))
    curved = np.clip(blurred * bias, 0, None) ** np.float32(np.exp(rng.normal(0, 0.15)))
    noise = np.float32(rng.uniform(0.005, 0.04)) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.ascontiguousarray(curved + noise, dtype=np.float32)


def _classes(inside: npt.NDArray[np.bool_], config: CropsConfig, rng: np.random.Generator) -> Classes:
    """Cut the structure across the front-back axis where the configuration asks for it."""
    if config.front_fraction is None:
        return inside.astype(np.uint8)
    present = np.flatnonzero(inside.any(axis=(0, 2)))
    cut = present[-1] + 1 - rng.uniform(*config.front_fraction) * (present[-1] + 1 - present[0])
    front = (np.arange(inside.shape[1]) >= cut)[None, :, None]
    classes: Classes = np.where(inside, np.where(front, 1, 2), 0).astype(np.uint8)
    return classes
