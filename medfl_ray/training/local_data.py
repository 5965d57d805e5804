"""What the trainer asks of one hospital's data; `data.dataset.HospitalData` provides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from medfl_ray.data.cases import PreparedCase


class LocalData(Protocol):
    """One hospital's patients: patches to train on and whole held-out cases to evaluate on."""

    @property
    def num_train_patients(self) -> int:
        """Actual number of training patients; it stays inside the hospital."""

    @property
    def labels(self) -> Mapping[int, str]:
        """Names of the label values above 0."""

    @property
    def holdout(self) -> Sequence[PreparedCase]:
        """Prepared held-out cases, in a fixed order."""

    def train_patches(self, patient_index: int, num_patches: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw K patches of one patient: images float32 [K, C, *S], targets int64 [K, *S] or [K]."""
