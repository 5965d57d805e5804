"""What a folder of images holds and what is wrong with it, for its owner's eyes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.layouts.catalogue import check_owners, list_cases
from medfl_ray.data.layouts.partitions import with_one_side_each
from medfl_ray.data.prepare.loading import read_case
from medfl_ray.data.volume import Volume
from medfl_ray.errors import ConfigError, DataError, LabelError, LayoutError

FLAT_STD = 1e-6
ANISOTROPIC = 4.0


@dataclass(frozen=True)
class CaseFacts:
    """What one case showed when it was read; `error` says why it cannot be used."""

    position: int
    file: str
    num_patient_cases: int
    shape: tuple[int, ...] = ()
    num_channels: int = 0
    spacing_mm: tuple[float, ...] = ()
    intensity: tuple[float, float, float] = (0.0, 0.0, 0.0)  # 1st percentile, median, 99th percentile
    label_ml: Mapping[int, float] = field(default_factory=dict)
    label_class: int | None = None
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Inspection:
    """The facts of all cases, and sentences about what needs attention."""

    index: CaseIndex
    labels: Mapping[int, str]
    cases: tuple[CaseFacts, ...]
    problems: tuple[str, ...]

    @property
    def num_unusable(self) -> int:
        """Cases that cannot be read."""
        return sum(bool(case.error) for case in self.cases)

    @property
    def num_patients(self) -> int:
        """Distinct patients."""
        return len({case.patient_id for case in self.index.cases if case.patient_id})


def inspect_folder(
    directory: Path,
    format: str = "auto",
    labels: Mapping[int, str] | None = None,
    on_case: Callable[[], None] = lambda: None,
    channels: tuple[str, ...] = (),
) -> Inspection:
    """Read every case of a folder once; a case that cannot be used becomes a fact, not an error.

    Args:
      channels: names by which a run on private data reads every case; series and regions of DICOM files must have them.

    Raises:
      DataError: the folder has no known layout, or no entry of its list can be read.
    """
    index = _listed(directory, format, channels)
    names = dict(labels or index.labels)
    counts: dict[str, int] = {}
    for case in index.cases:
        counts[case.patient_id] = counts.get(case.patient_id, 0) + 1
    facts = []
    for position, case in enumerate(index.cases):
        facts.append(_facts(position, case, names, counts[case.patient_id], bool(channels)))
        on_case()
    return Inspection(index, names, tuple(facts), (*index.problems, *_shared_images(index), *_problems(facts)))


def _listed(directory: Path, format: str, channels: tuple[str, ...]) -> CaseIndex:
    """List the cases with their problems; where one entry spoils the whole list, each entry by itself."""
    try:
        index = list_cases(directory, format, channels or None)
    except LayoutError as error:
        try:
            index = list_cases(directory, format, ())
        except (ConfigError, LayoutError):
            raise error from None
    return replace(index, cases=with_one_side_each(index.cases))


def _shared_images(index: CaseIndex) -> tuple[str, ...]:
    try:
        check_owners(index.cases)
    except LayoutError as error:
        return (str(error),)
    return ()


def write_case_table(inspection: Inspection, path: Path) -> None:
    """Write one CSV row per case; it names files, so it stays with the owner of the data."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        volumes = [f"{name} (ml)" for name in inspection.labels.values()]
        writer.writerow(
            ["case", "file", "shape", "spacing_mm", "p1", "median", "p99", *volumes, "class", "notes", "error"]
        )
        for case in inspection.cases:
            writer.writerow(
                [
                    case.position + 1,
                    case.file,
                    "x".join(map(str, case.shape)),
                    "x".join(f"{s:.3g}" for s in case.spacing_mm),
                    *(f"{value:.4g}" for value in case.intensity),
                    *(f"{case.label_ml.get(value, 0.0):.3f}" for value in inspection.labels),
                    "" if case.label_class is None else case.label_class,
                    "; ".join(case.notes),
                    case.error,
                ]
            )


def _facts(
    position: int, case: Case, labels: Mapping[int, str], num_patient_cases: int, by_name_alone: bool
) -> CaseFacts:
    if case.problem is not None:
        return CaseFacts(position, "", num_patient_cases, error=str(case.problem))
    file = "/".join(case.images[0].parts[-2:])
    try:
        image, label = read_case(case, labels, by_name_alone=by_name_alone)
        volumes = _label_volumes(label, labels) if isinstance(label, Volume) else {}
    except DataError as error:
        return CaseFacts(position, file, num_patient_cases, error=str(error))
    except Exception as error:  # noqa: BLE001 - a reader's surprise is a fact of the one case
        return CaseFacts(position, file, num_patient_cases, error=f"{type(error).__name__} while it was read")
    if isinstance(label, int) and labels and not 0 <= label <= max(labels):
        return CaseFacts(
            position, file, num_patient_cases, error=f"it is of class {label}; expected 0 to {max(labels)}"
        )
    if label is None:
        return CaseFacts(position, file, num_patient_cases, error="it has no label")
    low, median, high = np.percentile(image.array[0], [1, 50, 99])
    return CaseFacts(
        position,
        file,
        num_patient_cases,
        image.spatial_shape,
        image.array.shape[0],
        image.spacing_mm,
        (float(low), float(median), float(high)),
        volumes,
        label if isinstance(label, int) else None,
        (*image.notes, *(label.notes if isinstance(label, Volume) else ()), *_oddities(image, label, volumes)),
    )


def _label_volumes(label: Volume, labels: Mapping[int, str]) -> dict[int, float]:
    """Millilitres per label value, values without a name included."""
    voxel_ml = float(abs(np.linalg.det(label.affine[:3, :3]))) / 1000
    values, counts = np.unique(label.array, return_counts=True)
    volumes = {int(v): float(n) * voxel_ml for v, n in zip(values, counts, strict=True) if v != 0}
    strange = sorted(set(volumes) - set(labels)) if labels else [v for v in volumes if v < 0]
    if strange:
        raise LabelError(f"its label has the value {strange[0]}; expected 0 (background) or one of {sorted(labels)}")
    return volumes


def _oddities(image: Volume, label: Volume | int, volumes: Mapping[int, float]) -> tuple[str, ...]:
    found = []
    flat = [i + 1 for i, channel in enumerate(image.array) if float(channel.std()) < FLAT_STD]
    if flat:
        found.append(f"channel {', '.join(map(str, flat))} has one value everywhere")
    if isinstance(label, Volume) and not volumes:
        found.append("the label is empty")
    if max(image.spacing_mm) > ANISOTROPIC * min(image.spacing_mm):
        found.append(
            f"slices are {max(image.spacing_mm) / min(image.spacing_mm):.0f} times as thick as voxels are wide"
        )
    return tuple(found)


def _problems(facts: list[CaseFacts]) -> list[str]:
    problems = [f"case {f.position + 1}{f' ({f.file})' if f.file else ''}: {f.error}" for f in facts if f.error]
    notes: dict[str, list[int]] = {}
    for f in facts:
        for note in f.notes:
            notes.setdefault(note, []).append(f.position + 1)
    for note, cases in notes.items():
        shown = ", ".join(map(str, cases[:5])) + (f" and {len(cases) - 5} more" if len(cases) > 5 else "")
        problems.append(f"{note} (case {shown})")
    channels = {f.num_channels for f in facts if not f.error}
    if len(channels) > 1:
        problems.append(f"cases have different numbers of channels: {sorted(channels)}; every case needs the same")
    return problems
