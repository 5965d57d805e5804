"""Which patients a step without DP sees; under DP privacy.sampler decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from medfl_ray.config.training import TrainingConfig
from medfl_ray.training.gradients.patient_gradients import Patient
from medfl_ray.training.local_data import LocalData


def patient_batches(
    num_patients: int, batch_size: int, rng: np.random.Generator, order: Literal["shuffled", "listed"] = "shuffled"
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield batches of patient indices without end; each pass visits every patient once.

    Shuffled, each pass has a new order and a batch may straddle two passes, so that all batches are equally
    large, min(batch_size, num_patients). Listed, the order is that of the data and a pass ends with what is left.
    """
    while order == "listed":
        yield from np.split(np.arange(num_patients), range(batch_size, num_patients, batch_size))
    size = min(batch_size, num_patients)
    queue = np.empty(0, dtype=np.int64)
    while True:
        while len(queue) < size:
            queue = np.concatenate([queue, rng.permutation(num_patients)])
        yield queue[:size]
        queue = queue[size:]


def drawn_batches(training: TrainingConfig, data: LocalData, rng: np.random.Generator) -> Iterator[list[Patient]]:
    """Yield the patients of one step after another, without end, their patches drawn as each comes."""
    for batch in patient_batches(data.num_train_patients, training.batch_size, rng, training.patient_order):
        yield [data.train_patches(int(index), training.patches_per_patient, rng) for index in batch]
