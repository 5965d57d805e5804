"""One hospital's data, or several hospitals' in one trust domain, as a trainer sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from medfl_ray.config import DataConfig, Declared, TrainingConfig
from medfl_ray.data.cache import Loader, MemoryBudget, PreparedCases
from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.patches import augment, draw_patch, foreground_voxels
from medfl_ray.data.poison import Alteration
from medfl_ray.data.preprocess import Preprocessing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HospitalCases:
    """What a source knows of one hospital: a loader per training case, grouped by patient, and per held-out case."""

    hospital_id: str
    declared: Declared
    channels: tuple[str, ...]
    labels: dict[int, str]
    preprocessing: Preprocessing
    train: tuple[tuple[Loader, ...], ...]
    holdout: tuple[Loader, ...]


@dataclass(frozen=True)
class PatchSampling:
    """How patches are cut and varied."""

    patch_size: tuple[int, ...]
    foreground_fraction: float
    augment: bool

    @classmethod
    def from_config(cls, training: TrainingConfig, patch_size: tuple[int, ...]) -> PatchSampling:
        """Take the sampling that a run asks for."""
        return cls(patch_size, training.foreground_fraction, training.augment)


class HospitalData:
    """Training patches drawn from whole patients, and prepared held-out cases."""

    def __init__(
        self,
        hospitals: Sequence[HospitalCases],
        sampling: PatchSampling,
        data: DataConfig,
        budget: MemoryBudget | None = None,
        alter: Alteration | None = None,
    ) -> None:
        """Take the memory that all data of this process share; data.cache_mb for these alone if None.

        `alter` changes the patches that are trained on, for a study of attacks; held-out cases stay as they are.
        """
        self._hospitals = tuple(hospitals)
        budget = budget or MemoryBudget(None if data.cache_mb is None else data.cache_mb * 2**20)
        self._sampling, self._alter = sampling, alter
        patients = [patient for hospital in hospitals for patient in hospital.train]
        self._cases = PreparedCases([loader for patient in patients for loader in patient], data.cache, budget)
        ends = np.cumsum([0, *(len(patient) for patient in patients)])
        self._cases_of_patient = [range(a, b) for a, b in pairwise(ends)]
        held_out = [loader for hospital in hospitals for loader in hospital.holdout]
        self._holdout = PreparedCases(held_out, data.cache, budget)
        self._foreground: WeakKeyDictionary[PreparedCase, tuple[npt.NDArray[np.int64], ...]] = WeakKeyDictionary()
        # Left-right is the first axis of a RAS volume and the last one (columns) of a picture.
        self._mirror_axis = 0 if len(sampling.patch_size) == 3 else 1

    @property
    def hospital_ids(self) -> tuple[str, ...]:
        """Names of the hospitals whose data these are."""
        return tuple(hospital.hospital_id for hospital in self._hospitals)

    @property
    def declared(self) -> Declared:
        """The strictest declaration among the hospitals."""
        order: tuple[Literal["private", "public", "synthetic"], ...] = ("private", "public", "synthetic")
        return min((hospital.declared for hospital in self._hospitals), key=order.index)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the image channels."""
        return self._hospitals[0].channels

    @property
    def labels(self) -> dict[int, str]:
        """Names of the model's classes above 0."""
        return dict(self._hospitals[0].labels)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared before the model sees them."""
        return self._hospitals[0].preprocessing

    @property
    def num_train_patients(self) -> int:
        """Actual number of training patients; a secret of private data, for use inside the hospital only."""
        return len(self._cases_of_patient)

    @property
    def train(self) -> Sequence[PreparedCase]:
        """Training cases, prepared on first use; of private data for use inside the hospital only."""
        return self._cases

    @property
    def train_loaders(self) -> tuple[Loader, ...]:
        """What reads and prepares each training case."""
        return tuple(loader for hospital in self._hospitals for patient in hospital.train for loader in patient)

    @property
    def holdout(self) -> Sequence[PreparedCase]:
        """Held-out cases, prepared on first use."""
        return self._holdout

    def decode(self, num_workers: int) -> None:
        """Prepare every case now, with threads, where a cache keeps them."""
        self.decode_training(num_workers)
        self._holdout.decode_all(num_workers)

    def decode_training(self, num_workers: int = 1) -> None:
        """Prepare the training cases now, with threads, where a cache keeps them."""
        self._cases.decode_all(num_workers)

    def check_cases(self) -> None:
        """Prepare every case once, whether a cache keeps it or not.

        Raises:
          DataError: of the first case that cannot be read or does not fit.
        """
        for cases in (self._cases, self._holdout):
            for _ in cases:
                pass

    def train_patches(
        self, patient_index: int, num_patches: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw patches of one patient: images float32 [K, C, *patch], targets int64 [K, *patch] or [K].

        Each patch comes from a random case of the patient. The same generator state gives the same bits.
        """
        import torch

        pairs = [self._patch(self._cases_of_patient[patient_index], rng) for _ in range(num_patches)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        return images, torch.from_numpy(np.stack([target for _, target in pairs]))

    def holdout_patches(
        self, case_index: int, num_patches: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw patches of one held-out case exactly as `train_patches` draws those of a training patient."""
        import torch

        case = self._holdout[case_index]
        centres = foreground_voxels(case.label) if isinstance(case.label, np.ndarray) else ()
        pairs = [self._cut(case, centres, rng) for _ in range(num_patches)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        return images, torch.from_numpy(np.stack([target for _, target in pairs]))

    def _patch(
        self, positions: range, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        position = positions[int(rng.integers(len(positions)))]
        case = self._cases[position]
        patch = self._cut(case, self._centres(case), rng)
        return patch if self._alter is None else self._alter(*patch, rng)

    def _cut(
        self, case: PreparedCase, centres: tuple[npt.NDArray[np.int64], ...], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        sampling = self._sampling
        patch = draw_patch(case, centres, sampling.patch_size, sampling.foreground_fraction, rng)
        return augment(*patch, self._mirror_axis, rng) if sampling.augment else patch

    def _centres(self, case: PreparedCase) -> tuple[npt.NDArray[np.int64], ...]:
        if not isinstance(case.label, np.ndarray):
            return ()
        if case not in self._foreground:
            self._foreground[case] = foreground_voxels(case.label)
        return self._foreground[case]
