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
from medfl_ray.training.gradients.memory import give_back_memory
from medfl_ray.training.gradients.patient_gradients import GradientEngine, InGroups, OneAtATime, Patient, is_large
from medfl_ray.training.losses import PatientLoss

GROUP_SIZES = (2, 4, 8)
# Above this the memory of several patients at once costs more than the calls that a group saves.
SLOW_PATIENT_S = 1.0
# A larger group has to be this much faster, for it takes more memory; and no new size is tried after this time.
MIN_GAIN = 0.95
MEASURING_S = 3.0
REPEATS = 2
TOLERANCE = 1e-4
# Sums over hundreds of thousands of voxels in float32 differ with their order; a mistake differs by far more.
LARGE_TOLERANCE = 1e-3

Wanted = Literal["auto", "single", "grouped"]


def choose_engine(
    wanted: Wanted,
    network: nn.Module,
    loss: PatientLoss,
    mixed_precision: bool,
    make_patient: Callable[[], Patient],
    group_size: int | None = None,
) -> GradientEngine:
    """Return the engine that is asked for, or with 'auto' the fastest one; see `choose_group_size`."""
    size = choose_group_size(wanted, network, loss, mixed_precision, make_patient, group_size)
    return engine_of(size, network, loss, mixed_precision)


def engine_of(group_size: int, network: nn.Module, loss: PatientLoss, mixed_precision: bool) -> GradientEngine:
    """Return the engine for so many patients in one pass; 1 is patient by patient."""
    if group_size == 1:
        return OneAtATime(network, loss, mixed_precision)
    return InGroups(network, loss, mixed_precision, group_size)


def choose_group_size(
    wanted: Wanted,
    network: nn.Module,
    loss: PatientLoss,
    mixed_precision: bool,
    make_patient: Callable[[], Patient],
    group_size: int | None = None,
) -> int:
    """Return how many patients go through the network in one pass: 1, 2, 4 or 8, whichever is fastest here.

    Large volumes go two by two without a measurement: alone each takes a fifth longer, and more of them more memory.

    Args:
      make_patient: returns a made-up patient of the shape that training has.
      group_size: what was measured before or is wished for; then nothing is timed. A network that cannot be
        grouped, or whose grouped gradients differ, goes patient by patient whatever is wished for.
    """
    if wanted == "single" or group_size == 1 or why_not_grouped(network):
        return 1
    patient = make_patient()
    if wanted == "auto" and group_size is None and is_large(patient):
        group_size = GROUP_SIZES[0]
    patients = [patient, *(make_patient() for _ in range((group_size or GROUP_SIZES[-1]) - 1))]
    if group_size is None:
        group_size = _fastest(wanted, network, loss, mixed_precision, patients)
    # In full precision: bfloat16 rounds the two in different places.
    single, grouped = OneAtATime(network, loss), engine_of(group_size, network, loss, False)
    compared = _for_comparison(network, patients[:group_size])
    return group_size if _same_gradients(network, single, grouped, compared) else 1


def _for_comparison(network: nn.Module, patients: list[Patient]) -> list[Patient]:
    """Cut large volumes to half their edges where the network takes that: the comparison takes less memory, and what
    it leaves between the heap's blocks would add to that of every step."""
    if not is_large(patients[0]):
        return patients
    cut = [(_half(images, 2), _half(targets, 1)) for images, targets in patients]
    try:
        with torch.no_grad():
            network(cut[0][0])
    except (RuntimeError, ValueError, AssertionError):  # a network of a fixed size, or one with more levels than that
        return patients
    return cut


def _half(volume: Tensor, first_axis: int) -> Tensor:
    """Return the first half of every axis from `first_axis` on; a class, which has none, as it is."""
    return volume[(slice(None),) * first_axis + tuple(slice(edge // 2) for edge in volume.shape[first_axis:])]


def _fastest(
    wanted: Wanted, network: nn.Module, loss: PatientLoss, mixed_precision: bool, patients: list[Patient]
) -> int:
    """Try larger and larger groups until one is no faster per patient, or the time is up."""
    best, best_s = GROUP_SIZES[0], float("inf")
    start = time.perf_counter()
    if wanted == "auto":
        single = OneAtATime(network, loss, mixed_precision)
        list(single(iter(patients[:1])))
        if time.perf_counter() - start > SLOW_PATIENT_S:
            return 1
        best, best_s = 1, _seconds(single, patients[: GROUP_SIZES[0]]) / GROUP_SIZES[0]
    for size in GROUP_SIZES:
        seconds = _seconds(engine_of(size, network, loss, mixed_precision), patients[:size]) / size
        if seconds < MIN_GAIN * best_s:
            best, best_s = size, seconds
        elif best > 1:
            break
        if time.perf_counter() - start > MEASURING_S:
            break
    return best


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
        # One engine after the other, the larger first while memory is in one piece: side by side, both passes of large
        # volumes would be in memory at once.
        together = [gradient for gradient, _ in grouped(iter(patients))]
        give_back_memory()
        alone = [gradient for gradient, _ in single(iter(patients))]
        tolerance = LARGE_TOLERANCE if is_large(patients[0]) else TOLERANCE
        return all(_relative_error(a, b) < tolerance for a, b in zip(alone, together, strict=True))
    finally:
        network.train(was_training)
        give_back_memory()


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
