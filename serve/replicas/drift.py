"""How far the intensities of incoming images are from those that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medfl_ray.data.volume import Volume
from medfl_ray.export.description import ChannelIntensities, Fingerprint

PERCENTILES = (1, 25, 50, 75, 99)
MAX_VOXELS = 200_000
MIN_VOLUMES = 5
SHOWN_DIGITS = 1


def shift_of(volume: Volume, fingerprint: Fingerprint) -> tuple[float, ...]:
    """Return, per channel, the mean distance of five percentiles from the training's, in training deviations.

    0 is no difference. It is near the Wasserstein distance of the two distributions over the standard deviation.
    """
    return tuple(
        _channel_shift(channel.reshape(-1), expected)
        for channel, expected in zip(volume.array, fingerprint.channels, strict=False)
    )


def _channel_shift(voxels: np.ndarray[tuple[int], np.dtype[np.float32]], expected: ChannelIntensities) -> float:
    step = max(1, voxels.size // MAX_VOXELS)
    found = np.percentile(voxels[::step], PERCENTILES)
    return float(np.abs(found - np.array(expected.percentiles)).mean() / max(expected.std, 1e-6))


@dataclass(frozen=True)
class DriftState:
    """The running mean shift of one model's inputs, per channel, and how many volumes it has seen."""

    shifts: tuple[float, ...] = ()
    num_volumes: int = 0

    def after(self, shifts: Sequence[float], smoothing: float) -> DriftState:
        """Return the state after another volume; the first ones are averaged, later ones smoothed exponentially."""
        weight = max(smoothing, 1 / (self.num_volumes + 1))
        old = self.shifts if len(self.shifts) == len(shifts) else tuple(0.0 for _ in shifts)
        mean = tuple(before + weight * (now - before) for before, now in zip(old, shifts, strict=True))
        return DriftState(mean, self.num_volumes + 1)

    @property
    def shown(self) -> tuple[float, ...]:
        """The mean shifts as they may be published: after several volumes and rounded, lest they be one patient's."""
        return tuple(round(shift, SHOWN_DIGITS) for shift in self.shifts) if self.num_volumes >= MIN_VOLUMES else ()

    def is_alert(self, threshold: float) -> bool:
        """Whether enough volumes were seen and the mean shift of a channel is over the threshold."""
        return self.num_volumes >= MIN_VOLUMES and max(self.shifts, default=0.0) > threshold
