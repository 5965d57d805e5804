"""Intensities that a model was trained on, from which serving tells whether its images are of another kind.

Only of public or synthetic images: figures of private patients would be a release that no ledger accounts for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from medfl_ray.data.phantoms.source import PhantomLoader
from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.data.prepare.loading import CaseLoader
from medfl_ray.export.description import ChannelIntensities, Fingerprint

NUM_IMAGES = 16
VOXELS_PER_IMAGE = 50_000
PERCENTILES = (1, 25, 50, 75, 99)
Voxels = npt.NDArray[np.float32]


def fingerprint_of(data: HospitalData) -> Fingerprint | None:
    """Measure the training images of a hospital, as its files hold them; None where they are private.

    Raises:
      DataError: an image cannot be read.
    """
    if data.declared == "private":
        return None
    images = list(_unprepared(data))
    if not images:
        return None
    channels = zip(*images, strict=True)
    return Fingerprint(
        origin=f"{len(images)} {data.declared} training images",
        num_images=len(images),
        channels=tuple(_intensities(np.concatenate(channel)) for channel in channels),
    )


def _unprepared(data: HospitalData) -> Iterator[Sequence[Voxels]]:
    """Yield the voxels of each channel, neither resampled nor normalised; of large images every n-th."""
    loaders = data.train_loaders
    for position in np.unique(np.linspace(0, len(loaders) - 1, NUM_IMAGES).round().astype(int)).tolist():
        loader = loaders[position]
        if isinstance(loader, (CaseLoader, PhantomLoader)):
            as_is = {"intensity": "none", "spacing_mm": None}
            raw = replace(loader, preprocessing=loader.preprocessing.model_copy(update=as_is))
            yield [_thinned(channel.reshape(-1)) for channel in raw().image]


def _thinned(voxels: Voxels) -> Voxels:
    return voxels[:: max(1, voxels.size // VOXELS_PER_IMAGE)]


def _intensities(voxels: Voxels) -> ChannelIntensities:
    wide = voxels.astype(np.float64)
    low, lower, middle, upper, high = np.percentile(wide, PERCENTILES).tolist()
    return ChannelIntensities(
        mean=float(wide.mean()), std=float(wide.std()), percentiles=(low, lower, middle, upper, high)
    )
