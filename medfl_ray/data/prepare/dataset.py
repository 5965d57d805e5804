"""One hospital's data, or several hospitals' in one trust domain, as a trainer sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import structlog

from medfl_ray.config.base import DataKind
from medfl_ray.config.data import DataConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.prepare.attacked_patches import Alteration
from medfl_ray.data.prepare.cache import Loader, MemoryBudget, PreparedCases
from medfl_ray.data.prepare.patches import augment, draw_patch, foreground_voxels
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.errors import LayoutError

if TYPE_CHECKING:
    import torch

log = structlog.get_logger()


@dataclass(frozen=True)
class HospitalCases:
    """What a source knows of one hospital: a loader per training case, grouped by patient, and per held-out case.

    `notes` say which cases of private data are not used and why; they stay at the hospital.
    """

    hospital_id: str
    declared: DataKind
    channels: tuple[str, ...]
    labels: dict[int, str]
    preprocessing: Preprocessing
    train: tuple[tuple[Loader, ...], ...]
    holdout: tuple[Loader, ...]
    notes: tuple[str, ...] = ()


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
        *,
        cache_root: Path | None = None,
        num_workers: int = 0,
        blanks_unreadable: bool = False,
    ) -> None:
        """Take the memory that all data of this process share; data.cache_mb for these alone if None.

        `alter` changes the patches that are trained on, for a study of attacks; held-out cases stay as they are.

        Args:
          cache_root: where prepared volumes lie with data.cache: disk.
          num_workers: threads that decode.
          blanks_unreadable: of private data, whether a case that cannot be read while training becomes patches that
            are not numbers, whose gradient a private step counts as zero; failing would reveal that its patient was
            drawn.
        """
        self._hospitals = tuple(hospitals)
        self._budget = budget or MemoryBudget(None if data.cache_mb is None else data.cache_mb * 2**20)
        self._sampling, self._alter = sampling, alter
        self._data, self._cache_root, self._num_workers = data, cache_root, num_workers
        self._blanks_unreadable = blanks_unreadable and self.declared == "private"
        self._notes = tuple(note for hospital in hospitals for note in hospital.notes)
        self._hold(
            [patient for hospital in hospitals for patient in hospital.train],
            [loader for hospital in hospitals for loader in hospital.holdout],
        )
        self._foreground: WeakKeyDictionary[PreparedCase, tuple[npt.NDArray[np.int64], ...]] = WeakKeyDictionary()
        # Left-right is the first axis of a RAS volume and the last one (columns) of a picture.
        self._mirror_axis = 0 if len(sampling.patch_size) == 3 else 1

    @property
    def hospital_ids(self) -> tuple[str, ...]:
        """Names of the hospitals whose data these are."""
        return tuple(hospital.hospital_id for hospital in self._hospitals)

    @property
    def declared(self) -> DataKind:
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

    @property
    def notes(self) -> tuple[str, ...]:
        """Which cases of private data are not used, and why; for the hospital's own log alone."""
        return self._notes

    def close(self) -> None:
        """Remove what the disk cache holds."""
        self._cases.close()
        self._holdout.close()

    def decode(self, num_workers: int | None = None) -> None:
        """Prepare every case now, where a cache keeps them; with the threads that were asked for, if not others."""
        num_workers = self._num_workers if num_workers is None else num_workers
        self.decode_training(num_workers)
        self._holdout.decode_all(num_workers)

    def decode_training(self, num_workers: int = 1) -> None:
        """Prepare the training cases now, with threads, where a cache keeps them."""
        self._cases.decode_all(num_workers)

    def check_cases(self) -> None:
        """Prepare every case once, whether a cache keeps it or not; of private data leave out what cannot be used.

        A patient without a usable case is then as if absent, and no other patient moves.

        Raises:
          LayoutError: not one patient of private data can be used.
          DataError: of data that are not private, of the first case that cannot be read or does not fit.
        """
        if self.declared != "private":
            for cases in (self._cases, self._holdout):
                for _ in cases:
                    pass
            return
        train, held_out = self._cases.problems(self._num_workers), self._holdout.problems(self._num_workers)
        if train or held_out:
            self._notes += tuple(f"a case is not used: {problem}" for problem in (*train.values(), *held_out.values()))
            loaders = [
                tuple(loader for place, loader in zip(places, patient, strict=True) if place not in train)
                for places, patient in zip(self._cases_of_patient, self._patients, strict=True)
            ]
            left = [loader for place, loader in enumerate(self._held_out) if place not in held_out]
            self.close()
            self._hold([patient for patient in loaders if patient], left)
        if not self._patients and not self._held_out:
            raise LayoutError("not one patient of the hospital's private data can be used")

    def _hold(self, patients: Sequence[tuple[Loader, ...]], held_out: Sequence[Loader]) -> None:
        self._patients, self._held_out = tuple(patients), tuple(held_out)
        loaders = [loader for patient in patients for loader in patient]
        self._cases = PreparedCases(loaders, self._data.cache, self._budget, self._cache_root)
        ends = np.cumsum([0, *(len(patient) for patient in patients)])
        self._cases_of_patient = [range(a, b) for a, b in pairwise(ends)]
        self._holdout = PreparedCases(held_out, self._data.cache, self._budget, self._cache_root)

    def train_patches(
        self, patient_index: int, num_patches: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw patches of one patient: images float32 [K, C, *patch], targets int64 [K, *patch] or [K].

        Each patch comes from a random case of the patient. The same generator state gives the same bits.
        """
        import torch

        try:
            pairs = [self._patch(self._cases_of_patient[patient_index], rng) for _ in range(num_patches)]
        except Exception as error:
            if not self._blanks_unreadable:
                raise
            log.error("case_became_unreadable", hospitals=self.hospital_ids, exc_info=error)
            pairs = [self._blank()] * num_patches
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

    def _blank(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return a patch that is no number anywhere."""
        size = self._sampling.patch_size
        image = np.full((len(self.channels), *size), np.nan, dtype=np.float32)
        return image, np.zeros(size if self._data.task == "segmentation" else (), dtype=np.int64)

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
