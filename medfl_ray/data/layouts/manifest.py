"""A list of cases as CSV or JSON: patient_id, image or images, label, split."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medfl_ray.data.cases import Case, CaseIndex, unusable
from medfl_ray.data.layouts.decathlon import MAX_DIGITS, label_names, parse_json, stem_of
from medfl_ray.errors import LayoutError

SPLITS: dict[str, Literal["train", "holdout"] | None] = {
    "": None, "train": "train", "training": "train",
    "holdout": "holdout", "val": "holdout", "valid": "holdout", "validation": "holdout", "test": "holdout",
}  # fmt: skip
KNOWN = {"patient_id", "case_id", "image", "images", "label", "split"}


def read_manifest(path: Path) -> CaseIndex:
    """Read manifest.csv or manifest.json of a folder, or the given file; image paths are relative to it.

    CSV columns: patient_id; image, images (separated by ';') or one image_<channel> column per channel;
    label (a path or a class); optionally case_id, split and further columns, which become fields. JSON: a
    list of such objects, or {"channels": [...], "labels": {"1": name}, "cases": [...]}. A row that says no patient or
    image, or an unknown split, is a case with a `problem`. For private data see private_manifest.py.

    Raises:
      LayoutError: no manifest, not parseable, or rows that do not go together.
    """
    file = find_manifest(path)
    rows, channels, labels = _read_csv(file) if file.suffix.lower() == ".csv" else _read_json(file)
    if not rows:
        raise LayoutError(f"{file.name} lists no case; expected one row per examination")
    channels = channels or _channel_columns(rows[0])
    cases = tuple(case_of_row(file.parent, row, i, len(rows)) for i, row in enumerate(rows))
    counts = {len(case.images) for case in cases if case.problem is None}
    if len(counts) > 1:
        raise LayoutError(
            f"{file.name} lists cases with {sorted(counts)} images; expected the same channels for every case"
        )
    return CaseIndex(cases, channels, labels or _segment_names(cases))


def find_manifest(directory: Path) -> Path:
    """Return a folder's manifest.csv, manifest.json or only CSV file; a file as it is.

    Raises:
      LayoutError: there is none.
    """
    if directory.is_file():
        return directory
    for name in ("manifest.csv", "manifest.json"):
        if (directory / name).is_file():
            return directory / name
    tables = sorted(directory.glob("*.csv"))
    if len(tables) != 1:
        raise LayoutError(
            f"the folder {directory.name!r} has no manifest.csv or manifest.json and {len(tables)} other CSV files"
        )
    return tables[0]


def _read_csv(file: Path) -> tuple[list[Mapping[str, Any]], tuple[str, ...], dict[int, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except PermissionError:
        raise LayoutError(f"{file.name} may not be read by this user; change its permissions") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise LayoutError(
            f"{file.name} is not a UTF-8 CSV file ({type(error).__name__}); save it again as CSV UTF-8"
        ) from None
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise LayoutError(f"line {number + 2} of {file.name} has more or fewer values than the header has columns")
    return [{k.strip(): v.strip() for k, v in row.items()} for row in rows], (), {}


def _read_json(file: Path) -> tuple[list[Mapping[str, Any]], tuple[str, ...], dict[int, str]]:
    try:
        raw = parse_json(file.read_bytes(), file.name)
    except PermissionError:
        raise LayoutError(f"{file.name} may not be read by this user; change its permissions") from None
    top = raw if isinstance(raw, dict) else {"cases": raw}
    rows = top.get("cases")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LayoutError(f'{file.name} has no list of cases; expected [{{...}}, ...] or {{"cases": [{{...}}, ...]}}')
    return rows, tuple(str(name) for name in top.get("channels", ())), label_names(top)


def _channel_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(key.removeprefix("image_") for key in row if key.startswith("image_"))


def case_of_row(folder: Path, row: Mapping[str, Any], position: int, total: int) -> Case:
    """Return the case that a row describes, with a `problem` where it describes none."""
    patient, images = str(row.get("patient_id") or "").strip(), _images(row)
    split = str(row.get("split") or "").strip().lower()
    problem = _problem(row, patient, images, split, f"case {position + 1} of {total} in the manifest")
    if problem is not None:
        return unusable(problem, patient)
    fields = {str(k): str(v) for k, v in row.items() if k not in KNOWN and not k.startswith("image_")}
    case_id = str(row.get("case_id") or f"{position + 1:04d}-{stem_of(Path(images[0]))}")
    return Case(patient, case_id, tuple(folder / image for image in images), _label(folder, row), SPLITS[split], fields)


def _problem(row: Mapping[str, Any], patient: str, images: Sequence[str], split: str, where: str) -> LayoutError | None:
    if not patient:
        return LayoutError(
            f"{where} has no patient_id; every row needs one, it is the unit of privacy and of the split"
        )
    if not images or not all(images):
        return LayoutError(f"{where} has no image, or an empty one; fill image, images or every image_<channel> column")
    if split not in SPLITS:
        return LayoutError(
            f"{where} has the split {split!r}; expected train, holdout (also validation, test) or nothing"
        )
    return None


def _images(row: Mapping[str, Any]) -> Sequence[str]:
    listed = row.get("images") or row.get("image")
    if isinstance(listed, list):
        return [str(item) for item in listed]
    if listed:
        return [part.strip() for part in str(listed).split(";")]
    return [str(row[key] or "") for key in row if key.startswith("image_")]


def _label(folder: Path, row: Mapping[str, Any]) -> Path | int | None:
    label = row.get("label")
    if label is None or str(label).strip() == "":
        return None
    if re.fullmatch(r"-?\d+", str(label).strip()):
        if len(str(label).strip()) > MAX_DIGITS:
            raise LayoutError("a row of the manifest has a class of too many digits; correct its label")
        return int(label)
    return folder / str(label)


def _segment_names(cases: Sequence[Case]) -> dict[int, str]:
    """Names of the segments of DICOM labels; of other files only the run can name the values."""
    files = [case.label for case in cases if isinstance(case.label, Path) and case.label.suffix.lower() in (".dcm", "")]
    if not files or not all(file.is_file() for file in files):
        return {}
    from medfl_ray.data.formats.dicom_labels import name_segments

    return name_segments(files)
