"""The hospitals and networks of the peers' workload, as a simulation asks for them; `workload` is in their folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import workload

from medfl_ray.config.run import RunConfig

if TYPE_CHECKING:  # the process that starts the actors must not spend its time on loading torch before it does
    from torch import Tensor, nn


def name_of(number: int) -> str:
    """Name of the workload's client, so that names sort as numbers do."""
    return f"hospital-{number:05d}"


@dataclass(frozen=True)
class WorkloadHospital:
    """One client of the workload; its images are made when they are first asked for, and kept with masks as bytes."""

    num_dims: int
    number: int
    channels: Sequence[str] = ("image",)
    holdout: Sequence[Any] = ()

    @property
    def labels(self) -> Mapping[int, str]:
        """The one label."""
        return {1: "disc"}

    @property
    def num_train_patients(self) -> int:
        """Each image is a patient of its own."""
        return int(workload.n_samples({"dim": self.num_dims}, self.number))

    def train_patches(self, patient_index: int, num_patches: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the whole image [1, 1, *S] and its mask [1, *S]; nothing is drawn."""
        assert num_patches == 1
        images, masks = _images(self.num_dims, self.number)
        here = slice(patient_index, patient_index + 1)
        return images[here], masks[here].long()


@cache
def _images(num_dims: int, number: int) -> tuple[Tensor, Tensor]:
    from torch import from_numpy

    images, masks = workload.make_client({"dim": num_dims}, number)
    return from_numpy(np.ascontiguousarray(images)), from_numpy(masks.astype(np.uint8))


def open_data(run: RunConfig, hospital: str) -> WorkloadHospital:
    """Serve a hospital's data in whichever process trains it."""
    return WorkloadHospital(run.spatial_dims, int(hospital.removeprefix("hospital-")))


def network(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Build the workload's network with its first weights, as every contender does."""
    assert (in_channels, out_channels) == (1, 2)
    return workload.make_model({"dim": spatial_dims})  # type: ignore[no-any-return]
