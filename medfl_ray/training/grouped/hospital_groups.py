"""How many hospitals are trained at once: measured once on made-up images, or why they are trained in turn.

The choice concerns time alone: a hospital learns the same in a group of any size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medfl_ray.data.cases import PreparedCase
from medfl_ray.params import flatten
from medfl_ray.training.gradients.malloc_trim import LARGE_PATIENT_VOXELS
from medfl_ray.training.gradients.patient_gradients import is_large
from medfl_ray.training.grouped.trainer import GroupedTrainer, HospitalTask, why_not_together
from medfl_ray.training.rules.local_job import LocalJob
from medfl_ray.training.trainer import Trainer

CANDIDATES = (4, 8, 12, 16)
MEASURING_S = 4.0
# A group takes more memory than a hospital alone, and a larger one more than a smaller one.
MIN_GAIN = 0.95
MIN_GAIN_OF_MORE = 0.97
TURNS = 3
STEPS = 2


@dataclass(frozen=True)
class GroupChoice:
    """Hospitals that are trained at once, at least 1, and in one sentence why."""

    size: int
    reason: str


def choose_hospitals_per_group(trainer: Trainer) -> int:
    """Return how many hospitals are trained at once; see `explain_hospitals_per_group`."""
    return explain_hospitals_per_group(trainer).size


def explain_hospitals_per_group(trainer: Trainer) -> GroupChoice:
    """Choose how many hospitals are trained at once, within about 4 s.

    The network comes first: one that cannot be grouped is trained in turn whatever is configured. Then
    training.hospitals_per_group, where it is set; then patients so large that a group gains nothing; then time.
    The trainer's network is left with other weights, as after any training.
    """
    why = why_not_together(trainer)
    if why:
        return GroupChoice(1, f"Hospitals are trained one after the other: {why}.")
    configured = trainer.training.hospitals_per_group
    if configured is not None:
        return GroupChoice(configured, f"Hospitals are trained in groups of {configured}, as configured.")
    patient = trainer.dummy_patient()
    if is_large(patient):
        return GroupChoice(
            1,
            "Hospitals are trained one after the other: a patient has "
            f"{patient[0][:, 0].numel()} voxels, and from {LARGE_PATIENT_VOXELS} on a group only takes memory.",
        )
    return _measure(trainer)


def _measure(trainer: Trainer) -> GroupChoice:
    """Compare the time per hospital of larger and larger groups with that of one after the other.

    All sizes are timed in turn, several times over, and each counts with its shortest time: on a machine that does
    other things as well, sizes that are timed one after the other are timed under different loads.
    """
    start = time.perf_counter()
    seconds_each = _timing(trainer)
    seconds_each(1)  # what a first pass costs, no later one does
    shortest = {1: seconds_each(1)}
    for size in CANDIDATES:
        if (time.perf_counter() - start) + (1 + TURNS) * min(shortest.values()) * size > MEASURING_S:
            break
        shortest[size] = seconds_each(size)
    for _ in range(TURNS if len(shortest) > 1 else 0):  # hospitals too slow for any group are not timed again
        for size, before in shortest.items():
            shortest[size] = min(before, seconds_each(size))
    alone = shortest.pop(1)
    best, best_s = 1, alone
    for size, seconds in shortest.items():
        if seconds < (MIN_GAIN if best == 1 else MIN_GAIN_OF_MORE) * best_s:
            best, best_s = size, seconds
    if best == 1:
        return GroupChoice(1, "Hospitals are trained one after the other: no group was 5 % faster on this machine.")
    return GroupChoice(best, f"Hospitals are trained in groups of {best}, {alone / best_s:.1f} times as fast as alone.")


def _timing(trainer: Trainer) -> Callable[[int], float]:
    """Return what measures seconds a hospital of a group: of this process alone on the CPU, of the clock where a GPU
    works."""
    clock = time.process_time if trainer.device.type == "cpu" else time.perf_counter
    weights = flatten(trainer.network)
    data = MadeUpHospital(trainer)
    by_size = {size: GroupedTrainer(trainer, size) for size in (1, *CANDIDATES)}

    def seconds_each(size: int) -> float:
        tasks = [HospitalTask(data, LocalJob(STEPS, 1e-6, None, (0, 0, i))) for i in range(size)]
        start = clock()
        for _ in by_size[size].train(weights, tasks):
            pass
        return (clock() - start) / size

    return seconds_each


class MadeUpHospital:
    """As many patients as a batch takes, of random voxels."""

    holdout: tuple[PreparedCase, ...] = ()
    labels: dict[int, str] = {}  # noqa: RUF012 - empty for good

    def __init__(self, trainer: Trainer) -> None:
        """Make up one patient of the shape that training has, who stands for all."""
        images, targets = trainer.dummy_patient()
        self._patient = images.cpu(), targets.cpu()
        self.num_train_patients = trainer.training.batch_size

    def train_patches(self, patient_index: int, num_patches: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the patient."""
        return self._patient
