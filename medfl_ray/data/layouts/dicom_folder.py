"""A folder of DICOM files, sorted into patients, image series and the labels that refer to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from pydicom.dataset import Dataset

from medfl_ray.data.cases import Case, CaseIndex, unusable
from medfl_ray.data.formats.dicom_files import LABEL_MODALITIES, NOT_IMAGES, dicom_files, is_dicom, open_dicom
from medfl_ray.data.formats.dicom_labels import name_segments
from medfl_ray.errors import DataError, LayoutError, UnreadableFile


@dataclass(frozen=True)
class Series:
    """One image series of one patient; all its files lie in one folder."""

    patient: str
    uid: str
    folder: Path
    frame_of_reference: str
    name: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class LabelObject:
    """One SEG or RTSTRUCT file and the series it refers to."""

    patient: str
    path: Path
    frame_of_reference: str
    series_uids: frozenset[str]


def holds_dicom(directory: Path) -> bool:
    """Whether any file below a folder is DICOM."""
    return any(_is_readable_dicom(path) for path in sorted(directory.rglob("*")))


def _is_readable_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:  # one file that this user may not read does not hide the others
        return False


def read_dicom_folder(directory: Path) -> CaseIndex:
    """List the cases: one per label object, with the image series it refers to.

    A patient is a PatientID, or the top folder where that is empty. Other series of the patient in the same
    frame of reference become further channels when every case has them (named by SeriesDescription).

    A file that cannot be read, and a label that refers to no series of its patient, are cases with a `problem`.

    Raises:
      LayoutError: there is no image series or no label.
    """
    if not directory.is_dir():
        raise LayoutError("the DICOM layout needs a folder of patients; a file was given")
    damaged: list[DataError] = []
    series, labels, problems = scan(directory, damaged)
    if damaged and not (series and labels):
        raise damaged[0]
    if not series:
        raise LayoutError(
            f"the folder {directory.name!r} has no DICOM image series; expected patients' folders with images and "
            "labels"
        )
    drawn_on: dict[int, Series] = {}
    for label in labels:
        try:
            drawn_on[id(label)] = target_of(label, series)
        except LayoutError as error:
            damaged.append(error)
    whole = [label for label in labels if id(label) in drawn_on]
    channels = _shared_channels(whole, drawn_on, series)
    cases = (*map(unusable, damaged), *(_case(label, drawn_on[id(label)], series, channels) for label in whole))
    used = {label.patient for label in labels}
    unlabelled = {s.patient for s in series} - used
    if unlabelled:
        problems = (
            *problems,
            f"{len(unlabelled)} of {len({s.patient for s in series})} patients have no SEG or RTSTRUCT label and are "
            "left out",
        )
    if not cases:
        raise LayoutError(
            f"{len(series)} image series were found but no SEG or RTSTRUCT label; export the labels too, or list "
            "classes in a manifest"
        )
    return CaseIndex(cases, channels, name_segments([label.path for label in whole]), problems)


def scan(directory: Path, damaged: list[DataError]) -> tuple[list[Series], list[LabelObject], tuple[str, ...]]:
    """Return the image series and label objects of a folder, and what its owner should know.

    Args:
      damaged: takes what is wrong with files that cannot be read, which are then passed over.
    """
    images: dict[tuple[str, str, Path], tuple[Series, list[Path]]] = {}
    labels: list[LabelObject] = []
    for number, path in enumerate(dicom_files(directory, recursive=True, damaged=damaged)):
        try:
            found = _described(directory, path)
        except DataError as error:
            damaged.append(type(error)(f"DICOM file {number + 1} of the folder: {error}"))
            continue
        if isinstance(found, LabelObject):
            labels.append(found)
        elif found is not None:
            images.setdefault((found.patient, found.uid, found.folder), (found, []))[1].append(path)
    nameless = sum(not uid for _, uid, _ in images)
    problems = (
        (f"{nameless} series have no series UID; the files of a folder were taken as one series",) if nameless else ()
    )
    return [replace(first, files=tuple(files)) for first, files in images.values()], labels, problems


def _described(directory: Path, path: Path) -> Series | LabelObject | None:
    """Return the series or the label object that a file belongs to; None where it is neither.

    Raises:
      UnreadableFile: its header is not what it should be, in whatever way.
    """
    try:
        header = open_dicom(path, pixels=False)
        patient = str(header.get("PatientID") or "").strip() or _top_folder(directory, path)
        modality, frame = str(header.get("Modality", "")), str(header.get("FrameOfReferenceUID", ""))
        if modality in LABEL_MODALITIES:
            return LabelObject(patient, path, frame, _references(header))
        if modality in NOT_IMAGES:
            return None
        uid, name = str(header.get("SeriesInstanceUID", "")), str(header.get("SeriesDescription", ""))
        return Series(patient, uid, path.parent, frame, name)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - values are parsed when they are asked for, and fail in many ways
        raise UnreadableFile(
            f"the DICOM header is damaged ({type(error).__name__}); export it again from its archive"
        ) from None


def _top_folder(directory: Path, path: Path) -> str:
    parts = path.relative_to(directory).parts
    return parts[0] if len(parts) > 1 else path.stem


def _references(header: Dataset) -> frozenset[str]:
    """Series UIDs that a SEG or RTSTRUCT names, wherever in its sequences."""
    found: set[str] = set()
    pending: list[Dataset] = list(header.get("ReferencedSeriesSequence") or [])
    found |= {str(item.get("SeriesInstanceUID", "")) for item in pending}
    for frame in header.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for item in study.get("RTReferencedSeriesSequence") or []:
                found.add(str(item.get("SeriesInstanceUID", "")))
    return frozenset(found - {""})


def target_of(label: LabelObject, series: list[Series]) -> Series:
    """The image series on which a label was drawn: the one it names, else the patient's only one."""
    own = [s for s in series if s.patient == label.patient]
    named = [s for s in own if s.uid in label.series_uids]
    if len(named) == 1:
        return named[0]
    same_frame = [s for s in own if s.frame_of_reference and s.frame_of_reference == label.frame_of_reference]
    for candidates in (same_frame, own):
        if not label.series_uids and len(candidates) == 1:
            return candidates[0]
    raise LayoutError(
        f"a SEG or RTSTRUCT label refers to {len(named)} of its patient's {len(own)} image series; expected exactly "
        "one. "
        "Export the images it was drawn on, each series in one folder"
    )


def _shared_channels(labels: list[LabelObject], drawn_on: dict[int, Series], series: list[Series]) -> tuple[str, ...]:
    """Names of the series that every case has once, in its label's frame of reference."""
    shared: set[str] | None = None
    for label in labels:
        counts = Counter(s.name for s in companions_of(drawn_on[id(label)], series))
        names = {name for name, count in counts.items() if name and count == 1}
        shared = names if shared is None else shared & names
    targets = {drawn_on[id(label)].name for label in labels}
    if shared and targets <= shared:
        return tuple(sorted(shared))
    return tuple(targets) if len(targets) == 1 and "" not in targets else ("image",)


def companions_of(target: Series, series: list[Series]) -> list[Series]:
    if not target.frame_of_reference:
        return [target]
    return [s for s in series if s.patient == target.patient and s.frame_of_reference == target.frame_of_reference]


def _case(label: LabelObject, target: Series, series: list[Series], channels: tuple[str, ...]) -> Case:
    chosen = [target]
    if len(channels) > 1:
        by_name = {s.name: s for s in companions_of(target, series)}
        chosen = [by_name[name] for name in channels]
    fields = {f"series_{i}": s.uid for i, s in enumerate(chosen)}
    folders, files = tuple(s.folder for s in chosen), tuple(s.files for s in chosen)
    return Case(label.patient, f"{label.patient}-{label.path.stem}", folders, label.path, None, fields, files)
