"""Which way of computing patient gradients is faster here: measured on random images, never on a patient's.

Both ways give the same gradients, and that is checked before the faster one is used; the choice concerns time alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from medfl_ray.models.grouped import why_not_grouped
from medfl_ray.training.losses import PatientLoss
from medfl_ray.training.patient_gradients import GradientEngine, InGroups, OneAtATime, Patient

GROUP_SIZE = 4
# Above this the memory of several patients at once costs more than the calls that a group saves.
SLOW_PATIENT_S = 1.0
LEAST_GAIN = 0.95
REPEATS = 2
TOLERANCE = 1e-4


def choose_engine(
    wanted: Literal["auto", "single", "grouped"],
    network: nn.Module,
    loss: PatientLoss,
    mixed_precision: bool,
    make_patient: Callable[[], Patient],
) -> GradientEngine:
    """Return the engine that is asked for, or with 'auto' the faster one.

    Args:
      make_patient: returns a made-up patient of the shape that training has.
    """
    single = OneAtATime(network, loss, mixed_precision)
    if wanted == "single" or why_not_grouped(network):
        return single
    grouped = InGroups(network, loss, mixed_precision, GROUP_SIZE)
    patients = [make_patient() for _ in range(GROUP_SIZE)]
    start = time.perf_counter()
    list(single(iter(patients[:1])))
    if wanted == "auto" and time.perf_counter() - start > SLOW_PATIENT_S:
        return single
    # In full precision: bfloat16 rounds the two in different places.
    if not _same_gradients(network, OneAtATime(network, loss), InGroups(network, loss, False, GROUP_SIZE), patients):
        return single
    if wanted == "grouped":
        return grouped
    faster = _seconds(grouped, patients) < LEAST_GAIN * _seconds(single, patients)
    return grouped if faster else single


def make_patient_like(shape: tuple[int, ...], num_classes: int, classification: bool, device: torch.device) -> Patient:
    """Return random images of a shape [K, C, *S] and targets, of a patient who does not exist."""
    targets = shape[:1] if classification else (shape[0], *shape[2:])
    return torch.randn(shape, device=device), torch.randint(0, num_classes, targets, device=device)


def _same_gradients(
    network: nn.Module, single: GradientEngine, grouped: GradientEngine, patients: list[Patient]
) -> bool:
    """Compare with dropout off, which would draw differently for either."""
    was_training = network.training
    network.eval()
    try:
        pairs = zip(single(iter(patients)), grouped(iter(patients)), strict=True)
        return all(_relative_error(expected, found) < TOLERANCE for (expected, _), (found, _) in pairs)
    finally:
        network.train(was_training)


def _relative_error(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    flat = torch.cat([part.flatten().double() for part in expected])
    other = torch.cat([part.flatten().double() for part in found])
    return float((flat - other).norm() / flat.norm().clamp_min(1e-30))


def _seconds(engine: GradientEngine, patients: list[Patient]) -> float:
    """Return the shortest of a few runs; other load only ever lengthens one."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        list(engine(iter(patients)))
        times.append(time.perf_counter() - start)
    return min(times)
