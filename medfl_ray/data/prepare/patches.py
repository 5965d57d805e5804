"""Random patches of one prepared case; every draw comes from the generator that is handed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.volume import Array

V = TypeVar("V", bound=np.generic)
MAX_VOXELS_KEPT = 20_000  # Per class; enough centres, and bounded memory for whole-body volumes.


def foreground_voxels(label: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], ...]:
    """Return flat positions of the voxels of each class that is present, background apart, thinned evenly."""
    present = [value for value in np.unique(label) if value > 0]
    voxels = [np.flatnonzero(label == value) for value in present]
    return tuple(v[:: max(1, len(v) // MAX_VOXELS_KEPT)] for v in voxels)


def draw_patch(
    case: PreparedCase,
    foreground: Sequence[npt.NDArray[np.int64]],
    patch_size: tuple[int, ...],
    foreground_fraction: float,
    rng: np.random.Generator,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Cut one patch: image [C, *patch] and target [*patch], or [] for a class.

    With probability `foreground_fraction` the patch holds a random voxel of a random class, in its middle
    where the volume's border allows. A volume smaller than the patch is padded with zeros all round, as the
    sliding window pads it in evaluation.
    """
    shape = case.image.shape[1:]
    if foreground and rng.random() < foreground_fraction:
        voxels = foreground[int(rng.integers(len(foreground)))]
        centre = np.unravel_index(int(voxels[int(rng.integers(len(voxels)))]), shape)
        starts = [int(np.clip(c - p // 2, 0, max(0, n - p))) for c, p, n in zip(centre, patch_size, shape, strict=True)]
    else:
        starts = [int(rng.integers(0, max(0, n - p) + 1)) for p, n in zip(patch_size, shape, strict=True)]
    window = tuple(slice(s, s + p) for s, p in zip(starts, patch_size, strict=True))
    image = _pad(case.image[(slice(None), *window)], patch_size)
    if isinstance(case.label, np.ndarray):
        return image, _pad(case.label[window][None], patch_size)[0].astype(np.int64)
    return image, np.asarray(case.label, dtype=np.int64)


def augment(
    image: Array, target: npt.NDArray[np.int64], mirror_axis: int, rng: np.random.Generator
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Mirror left and right, scale and shift the intensities and add noise, in that order.

    Only left and right are mirrored: an upside-down or back-to-front body does not occur, and labels such
    as anterior and posterior would lose their meaning.
    """
    if rng.random() < 0.5:
        image = np.flip(image, axis=mirror_axis + 1)
        target = np.flip(target, axis=mirror_axis) if target.ndim else target
    shape = (image.shape[0], *([1] * (image.ndim - 1)))
    scale = rng.uniform(0.9, 1.1, shape).astype(np.float32)
    shift = rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    noise = np.float32(rng.uniform(0, 0.1)) * rng.standard_normal(image.shape, dtype=np.float32)
    return image * scale + shift + noise, target


def _pad(array: npt.NDArray[V], patch_size: tuple[int, ...]) -> npt.NDArray[V]:
    missing = [p - n for p, n in zip(patch_size, array.shape[1:], strict=True)]
    if not any(missing):
        return np.array(array)
    return np.pad(array, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
