"""Whether predicted probabilities come true: counts per bin of probability, from which ECE and a diagram follow.

Shapes: L classes, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medfl_ray.messages import ReliabilityBins

NUM_BINS = 10


class ReliabilityCounter:
    """Adds up, class by class, how often a probability was given and how often it was right."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the names of the classes whose probabilities are counted."""
        self._names = tuple(names)
        shape = (len(names), NUM_BINS)
        self._count, self._given, self._true = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    def add(self, probabilities: Tensor, truth: Tensor, first_class: int) -> None:
        """Count one case.

        Args:
          probabilities: [first_class + L, *S] or [first_class + L]; classes below the first one are not counted.
          truth: classes [*S], or [].
        """
        from monai.metrics.calibration import calibration_binning

        chosen = probabilities[first_class:].reshape(1, len(self._names), -1)
        if not torch.isfinite(chosen).all():
            return  # what is not a number lies in no bin
        values = torch.arange(first_class, first_class + len(self._names)).reshape(1, -1, 1)
        right = (truth.reshape(1, 1, -1) == values).float()
        given, true, count = calibration_binning(chosen, right, num_bins=NUM_BINS)
        self._count += count[0].double()
        self._given += (given.nan_to_num(0.0) * count)[0].double()
        self._true += (true.nan_to_num(0.0) * count)[0].double()

    def bins(self) -> dict[str, ReliabilityBins]:
        """Return what was counted, per class; an empty bin has sums of 0."""
        return {
            name: ReliabilityBins(
                counts=tuple(int(n) for n in self._count[place]),
                sum_probability=tuple(round(float(v), 6) for v in self._given[place]),
                num_true=tuple(round(float(v), 6) for v in self._true[place]),
            )
            for place, name in enumerate(self._names)
        }
