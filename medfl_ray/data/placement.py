"""MONAI transforms on one array: orientation, spacing and intensity.

Apart from `preprocess`, so that the description of a preparation can be read without importing MONAI.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.intensity.array import NormalizeIntensity, ScaleIntensityRange, ScaleIntensityRangePercentiles
from monai.transforms.spatial.array import Orientation, Spacing

from medfl_ray.data.volume import Affine, Array


def place(
    array: Array, affine: Affine, orientation: str | None, spacing_mm: tuple[float, ...] | None, mode: str
) -> tuple[Array, Affine]:
    """Turn the axes towards an anatomical orientation and resample to a spacing.

    Args:
      array: [C, *S].
      mode: 'bilinear' for images (trilinear in 3D), 'nearest' for labels.
    """
    tensor: torch.Tensor = MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(affine.copy())
    )
    if orientation is not None:
        tensor = Orientation(axcodes=orientation, labels=(("L", "R"), ("P", "A"), ("I", "S")))(tensor)
    if spacing_mm is not None:
        tensor = Spacing(pixdim=spacing_mm, mode=mode, padding_mode="border", dtype=np.float32)(tensor)
    placed = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
    return placed, _four_by_four(cast(MetaTensor, tensor).affine.numpy().astype(np.float64))


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
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if intensity == "zscore":
        scaled = NormalizeIntensity(channel_wise=True)(tensor)
    elif intensity == "percentile":
        scaled = torch.stack([_between_percentiles(channel) for channel in tensor])
    else:
        lower, upper = window if window is not None else (0.0, 1.0)
        scaled = ScaleIntensityRange(lower, upper, 0.0, 1.0, clip=True)(tensor)
    return np.ascontiguousarray(torch.as_tensor(scaled).numpy(), dtype=np.float32)


def _between_percentiles(channel: torch.Tensor) -> torch.Tensor:
    """Scale one channel; where the percentiles coincide (a sequence that was not acquired) it becomes 0."""
    low, high = np.percentile(channel.numpy(), [1, 99])
    if low == high:
        return torch.zeros_like(channel)
    return torch.as_tensor(ScaleIntensityRangePercentiles(1, 99, 0.0, 1.0, clip=True)(channel))
