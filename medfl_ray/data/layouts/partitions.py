"""Deal patients to simulated hospitals, and hold patients out for evaluation; a patient is never divided."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medfl_ray.config.data import PartitionConfig
from medfl_ray.data.cases import Case
from medfl_ray.errors import ConfigError, LayoutError

SMALLEST_HOSPITAL = 2  # One patient to train on, one to evaluate on.
DIRICHLET_ATTEMPTS = 1000


def partition_patients(cases: Sequence[Case], partition: PartitionConfig, seed: int) -> dict[str, tuple[Case, ...]]:
    """Return the cases of each hospital, hospitals in a fixed order that file order does not change.

    Raises:
      ConfigError: there are too few patients, or the field does not divide them.
      LayoutError: a patient's cases name two hospitals.
    """
    if partition.by == "field":
        return _by_field(cases, str(partition.field))
    if partition.by == "single":
        return {"hospital-1": tuple(cases)}
    patients = shuffled_patients(cases, seed)
    if len(patients) < SMALLEST_HOSPITAL * partition.num_hospitals:
        raise ConfigError(
            f"{len(patients)} patients cannot be dealt to {partition.num_hospitals} hospitals with at least "
            f"{SMALLEST_HOSPITAL} each; lower data.partition.num_hospitals"
        )
    if partition.by == "iid":
        sizes = [len(part) for part in np.array_split(np.arange(len(patients)), partition.num_hospitals)]
    else:
        sizes = _dirichlet_sizes(len(patients), partition, seed)
    ends = np.cumsum(sizes)
    groups = [patients[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return {f"hospital-{i + 1}": _cases_of(cases, set(group)) for i, group in enumerate(groups)}


def split_holdout(
    cases: Sequence[Case], fraction: float, seed: int, independently: bool = False
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return (training cases, held-out cases), by patient.

    A split in the case list is kept. Patients without one are drawn by `fraction` when the list holds
    nobody out, and train otherwise. The draw depends on the seed and the patients' names alone.

    With `independently` a patient's own name decides for everybody without a split, whoever else has one, so that one
    patient more never moves another to the other side, which add/remove adjacency asks of private data; the share is
    then met on average only, and a side may be empty.

    Raises:
      LayoutError: one patient is on both sides, or a side is empty.
    """
    check_splits(cases)
    if independently:
        return _split_independently(cases, fraction, seed)
    held_out = {case.patient_id for case in cases if case.split == "holdout"}
    free = [p for p in shuffled_patients(cases, seed) if p not in {c.patient_id for c in cases if c.split}]
    num_patients = len({case.patient_id for case in cases})
    if num_patients < SMALLEST_HOSPITAL:
        raise LayoutError(
            f"{num_patients} patient(s) found; expected at least 2, one to train on and one to evaluate on"
        )
    if not held_out:
        wanted = int(np.clip(round(fraction * num_patients), 1, num_patients - 1))
        held_out = set(free[:wanted])
    if not held_out or len(held_out) == num_patients:
        side = "evaluate" if not held_out else "train"
        raise LayoutError(f"the split leaves no patient to {side} on; correct the case list's split column, or add one")
    return (
        tuple(case for case in cases if case.patient_id not in held_out),
        tuple(case for case in cases if case.patient_id in held_out),
    )


def _split_independently(
    cases: Sequence[Case], fraction: float, seed: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    def is_held_out(case: Case) -> bool:
        return case.split == "holdout" or (case.split is None and patient_draw(case.patient_id, seed) < fraction)

    return tuple(c for c in cases if not is_held_out(c)), tuple(c for c in cases if is_held_out(c))


def with_one_side_each(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Mark the cases of patients who are on two sides of the split as unusable, and leave all others as they are."""
    sides: dict[str, set[str | None]] = {}
    for case in cases:
        if case.problem is None:
            sides.setdefault(case.patient_id, set()).add(case.split)
    torn = LayoutError("its patient is on two sides of the split; put every patient on one side")
    return tuple(
        replace(case, problem=torn) if case.problem is None and len(sides[case.patient_id]) > 1 else case
        for case in cases
    )


def check_splits(cases: Sequence[Case]) -> None:
    """Refuse a case list that puts one patient on two sides.

    Raises:
      LayoutError: with the positions of two such cases.
    """
    first: dict[str, int] = {}
    for position, case in enumerate(cases):
        other = first.setdefault(case.patient_id, position)
        if cases[other].split != case.split:
            raise LayoutError(
                f"cases {other + 1} and {position + 1} of {len(cases)} are of one patient but on two sides of the "
                "split "
                f"({cases[other].split or 'unassigned'} and {case.split or 'unassigned'}); put every patient on one "
                "side"
            )


def shuffled_patients(cases: Sequence[Case], seed: int) -> list[str]:
    """Return the patients in an order given by the seed and their names, whatever the order of the cases."""
    patients = {case.patient_id for case in cases}
    return sorted(patients, key=lambda patient: hashlib.sha256(_bytes(f"{seed}:{patient}")).digest())


def patient_draw(patient: str, seed: int) -> float:
    """Return a patient's own draw in [0, 1), given by the seed and the name alone."""
    digest = hashlib.sha256(_bytes(f"holdout:{seed}:{patient}")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a file's name, and so a patient's, may hold bytes that are no text


def _cases_of(cases: Sequence[Case], patients: set[str]) -> tuple[Case, ...]:
    return tuple(case for case in cases if case.patient_id in patients)


def _by_field(cases: Sequence[Case], field: str) -> dict[str, tuple[Case, ...]]:
    missing = sum(field not in case.fields for case in cases)
    if missing:
        known = sorted(set().union(*(case.fields for case in cases)))
        raise ConfigError(
            f"{missing} of {len(cases)} cases have no field {field!r} (data.partition.field); fields found: "
            f"{', '.join(known) or 'none'}"
        )
    home: dict[str, str] = {}
    for position, case in enumerate(cases):
        if home.setdefault(case.patient_id, case.fields[field]) != case.fields[field]:
            raise LayoutError(
                f"case {position + 1} of {len(cases)}: its patient has two values of {field!r}, so two hospitals; "
                "a patient belongs to one"
            )
    values = sorted(set(home.values()))
    names = {value: _hospital_name(value) for value in values}
    if len(set(names.values())) < len(names):
        raise ConfigError(f"two values of {field!r} give one hospital name; rename them to differ in letters or digits")
    return {names[value]: tuple(case for case in cases if case.fields[field] == value) for value in values}


def _hospital_name(value: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-._")[:64]
    return name or "unnamed"


def _dirichlet_sizes(num_patients: int, partition: PartitionConfig, seed: int) -> list[int]:
    """Draw hospital sizes; a draw with a hospital below two patients is repeated, at last evened out."""
    rng = np.random.default_rng(np.random.SeedSequence([seed & (2**64 - 1), 0x5EED]))
    sizes = np.zeros(partition.num_hospitals, dtype=int)
    for _ in range(DIRICHLET_ATTEMPTS):
        shares = rng.dirichlet([partition.alpha] * partition.num_hospitals)
        sizes = np.diff(np.round(np.concatenate([[0.0], np.cumsum(shares)]) * num_patients)).astype(int)
        if sizes.min() >= SMALLEST_HOSPITAL:
            break
    while sizes.min() < SMALLEST_HOSPITAL:
        sizes[sizes.argmax()] -= 1
        sizes[sizes.argmin()] += 1
    return [int(size) for size in sizes]
