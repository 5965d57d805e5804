"""Which patients a private step sees: each with probability q, independently, from OS entropy."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import PrivacyConfigError

UNIFORM_BITS = 53


class PoissonSampler:
    """Poisson sampling of patients; takes no seed, because a known sample voids the amplification by sampling."""

    def __init__(self, sample_rate: float) -> None:
        """Take the rate q in (0, 1].

        Raises:
          PrivacyConfigError: the rate is outside (0, 1].
        """
        if not 0 < sample_rate <= 1:
            raise PrivacyConfigError(f"sample_rate is {sample_rate!r}; it must lie above 0 and be at most 1")
        self._sample_rate = sample_rate

    def draw(self, num_patients: int) -> npt.NDArray[np.intp]:
        """Return the indices of one step's patients, shape [B] with B from 0 to num_patients, ascending.

        Each index is drawn at most once: a patient who contributed twice to a step would break the clip bound.
        """
        # Read anew from the operating system each time: nothing is kept that a copy of the process could repeat.
        words = np.frombuffer(os.urandom(8 * num_patients), dtype=np.uint64)
        uniform = (
            words >> np.uint64(64 - UNIFORM_BITS)
        ) * 2.0**-UNIFORM_BITS  # in [0, 1), so that q = 1 takes everyone
        return np.flatnonzero(uniform < self._sample_rate)
