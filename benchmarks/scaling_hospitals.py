"""Hospitals of random images for scaling.py; actors import this module to open their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 32
MIN_PATIENTS, SIZES = 8, 25


def num_patients(number: int) -> int:
    """Number of images of a hospital, 8 to 32 in a fixed pattern."""
    return MIN_PATIENTS + number * 7 % SIZES


def policies(count: int) -> tuple[SitePolicy, ...]:
    """Return what the first hospitals declare."""
    return tuple(
        SitePolicy(
            hospital=f"hospital-{number:05d}",
            data_set="random",
            declared="synthetic",
            num_patients=num_patients(number),
        )
        for number in range(count)
    )


@dataclass
class RandomHospital:
    """Images of noise with random masks, made when they are first asked for."""

    number: int
    channels: Sequence[str] = ("image",)
    holdout: Sequence[Any] = ()

    @property
    def labels(self) -> Mapping[int, str]:
        """The one label."""
        return {1: "noise"}

    @property
    def num_train_patients(self) -> int:
        """Each image is a patient."""
        return num_patients(self.number)

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        from torch import from_numpy

        rng = np.random.default_rng(self.number)
        images = rng.standard_normal((self.num_train_patients, 1, SIZE, SIZE), dtype=np.float32)
        return from_numpy(images), from_numpy((images[:, 0] > 0).astype(np.uint8))

    def train_patches(self, patient_index: int, num_patches: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the whole image [1, 1, *S] and its mask [1, *S]."""
        images, masks = self._images
        here = slice(patient_index, patient_index + 1)
        return images[here], masks[here].long()


def open_data(run: RunConfig, hospital: str) -> RandomHospital:
    """Serve a hospital's data in whichever process trains it."""
    return RandomHospital(int(hospital.removeprefix("hospital-")))
