"""Orientation, spacing and intensity of one array, equal to MONAI's transforms.

Only resampling needs MONAI and torch, which take half a gigabyte: a process that serves a model without it stays small.
"""

from __future__ import annotations

import math
from typing import Any, cast

import nibabel as nib
import numpy as np

from medfl_ray.data.volume import Affine, Array, spacing_of
from medfl_ray.errors import GeometryError

BLOCK = 2**16
AXES = (("L", "R"), ("P", "A"), ("I", "S"))


def place(
    array: Array,
    affine: Affine,
    orientation: str | None,
    spacing_mm: tuple[float, ...] | None,
    mode: str,
    max_voxels: int | None = None,
) -> tuple[Array, Affine]:
    """Turn the axes towards an anatomical orientation and resample to a spacing.

    Args:
      array: [C, *S].
      mode: 'bilinear' for images (trilinear in 3D), 'nearest' for labels.
      max_voxels: most voxels of the resampled array, over all channels; checked before anything is made.

    Raises:
      GeometryError: the resampled array would have more.
    """
    if orientation is not None:
        array, affine = _turn(array, affine, orientation)
    if spacing_mm is not None:
        if max_voxels is not None:
            _check_size(array, affine, spacing_mm, max_voxels)
        return _resample(array, affine, spacing_mm, mode)
    return np.ascontiguousarray(array, dtype=np.float32), affine.copy()


def _turn(array: Array, affine: Affine, orientation: str) -> tuple[Array, Affine]:
    """Flip and swap axes; no voxel changes its value or its place in the patient."""
    orientations: Any = nib.orientations
    target = orientations.axcodes2ornt(orientation, labels=AXES)
    change = orientations.ornt_transform(nib.io_orientation(affine), target)  # type: ignore[no-untyped-call]
    if np.array_equal(change, [[axis, 1] for axis in range(len(change))]):
        return array, affine
    turned = np.stack([orientations.apply_orientation(channel, change) for channel in array])
    return turned, affine @ orientations.inv_ornt_aff(change, array.shape[1:])


def _check_size(array: Array, affine: Affine, spacing_mm: tuple[float, ...], max_voxels: int) -> None:
    """A header of a few bytes can claim thick voxels, each of which becomes thousands."""
    from monai.data.utils import compute_shape_offset, to_affine_nd, zoom_affine

    shape = array.shape[1:]
    found = spacing_of(affine, len(shape))
    edges = [(edge - 1) * have / want + 1 for edge, have, want in zip(shape, found, spacing_mm, strict=True)]
    if max(edges) < 2**31:  # MONAI rounds, and takes the box around a sheared image; beyond, its integers overflow
        own = to_affine_nd(len(shape), affine)
        exact, _ = compute_shape_offset(shape, own, zoom_affine(own, spacing_mm, diagonal=False))
        edges = [int(edge) for edge in exact]
    if array.shape[0] * math.prod(edges) > max_voxels:
        raise GeometryError(
            f"at the model's spacing the image would have {' x '.join(f'{edge:.4g}' for edge in edges)} voxels in "
            f"{array.shape[0]} channels; at most {max_voxels} in all are prepared. Check the image's voxel spacing, or "
            "crop it"
        )


def _resample(array: Array, affine: Affine, spacing_mm: tuple[float, ...], mode: str) -> tuple[Array, Affine]:
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Spacing

    tensor = MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine.copy()))
    resampled = Spacing(pixdim=spacing_mm, mode=mode, padding_mode="border", dtype=np.float32)(tensor)
    placed = np.ascontiguousarray(resampled.numpy(), dtype=np.float32)
    return placed, _four_by_four(cast(MetaTensor, resampled).affine.numpy().astype(np.float64))


def _four_by_four(affine: Affine) -> Affine:
    if affine.shape == (4, 4):
        return affine
    full: Affine = np.eye(4)
    full[:2, :2], full[:2, 3] = affine[:2, :2], affine[:2, 2]
    return full


def normalise(array: Array, intensity: str, window: tuple[float, float] | None) -> Array:
    """Scale the intensities of one volume [C, *S]; each channel by its own voxels.

    zscore: mean 0, standard deviation 1. percentile: the 1st and 99th percentile become 0 and 1, clipped.
    window: the window's limits become 0 and 1, clipped.
    """
    if intensity == "none":
        return array
    scaled: Array = np.empty(array.shape, dtype=np.float32)
    for channel, target in zip(array, scaled, strict=True):
        if intensity == "zscore":
            np.subtract(channel, np.float32(channel.mean(dtype=np.float64)), out=target)
            deviation = np.float32(math.sqrt(_mean_square(target)))
            target /= deviation if deviation > 0 else np.float32(1)
        else:
            low, high = np.percentile(channel, [1, 99]) if intensity == "percentile" else (window or (0.0, 1.0))
            _between(channel, float(low), float(high), target)
    return scaled


def _mean_square(values: Array) -> float:
    """Return the mean of the squares, by blocks: no second array as large as the image."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))
    return math.fsum(float(np.square(block).sum(dtype=np.float64)) for block in blocks) / flat.size


def _between(channel: Array, low: float, high: float, target: Array) -> None:
    """Scale one channel; where the limits coincide (a sequence that was not acquired) it becomes 0."""
    if low == high:
        target[...] = 0
        return
    np.subtract(channel, np.float32(low), out=target)
    target /= np.float32(high - low)
    np.clip(target, 0, 1, out=target)
