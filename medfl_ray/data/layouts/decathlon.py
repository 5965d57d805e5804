"""The layouts of the Medical Segmentation Decathlon and of nnU-Net, both around a dataset.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medfl_ray.data.cases import Case, CaseIndex, patient_name, unusable
from medfl_ray.data.formats.readers import IMAGE_ENDINGS
from medfl_ray.errors import LayoutError

Split = Literal["train", "holdout"] | None
NO_PATIENTS = (
    "the layout names no patients, so every case counts as one; add patient_id to dataset.json if some share one"
)

UNDECODED = re.compile("[\ud800-\udfff]")
UNREADABLE = "\udcff"
MAX_DIGITS = 400
"""No whole number of a list has more; Python reads those of up to 4300 digits."""
OWN = "./"
"""Starts a patient's name that is made from a path; a given name that starts so gets it once more."""
VALUE = re.compile(r"-?[0-9]{1,9}")


def read_decathlon(directory: Path, private: bool = False) -> CaseIndex:
    """List the cases of a Decathlon folder; a key of an entry beside image and label becomes a field.

    An entry without an image has a `problem`; one without patient_id is a patient of its own, see `own_patient`.

    Args:
      private: see `read_json`.

    Raises:
      LayoutError: dataset.json is missing, not JSON, or lists no case.
    """
    raw = read_json(directory / "dataset.json", private)
    training, validation = raw.get("training") or [], raw.get("validation") or []
    if not isinstance(training, list) or not isinstance(validation, list):
        raise LayoutError(
            "'training' or 'validation' of dataset.json is no list; expected entries with 'image', 'label'"
        )
    entries: list[tuple[Any, Split]] = [(entry, None) for entry in training]
    entries += [(entry, "holdout") for entry in validation if isinstance(entry, Mapping) and "label" in entry]
    if not entries:
        raise LayoutError("dataset.json has no 'training' list; expected entries with 'image' and 'label'")
    cases = [_case(directory, entry, split, i) for i, (entry, split) in enumerate(entries)]
    problems = (
        () if any("patient_id" in entry for entry, _ in entries if isinstance(entry, Mapping)) else (NO_PATIENTS,)
    )
    return CaseIndex(
        tuple(sorted(cases, key=lambda c: (c.case_id, c.patient_id))), channel_names(raw), label_names(raw), problems
    )


def read_nnunet(directory: Path, private: bool = False) -> CaseIndex:
    """List the training cases of an nnU-Net raw folder, versions 1 and 2 of its dataset.json.

    A case that lacks one of its channels has a `problem`. One that patient_ids does not name is a patient called as the
    case, so that a later case can be given to that patient.

    Args:
      private: see `read_json`.

    Raises:
      LayoutError: a folder is missing.
    """
    raw = read_json(directory / "dataset.json", private)
    images, labels = directory / "imagesTr", directory / "labelsTr"
    if not images.is_dir() or not labels.is_dir():
        raise LayoutError("the nnU-Net folder has no imagesTr or no labelsTr; expected both beside dataset.json")
    channels = channel_names(raw)
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir()):
        match = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
        if match and path.name.lower().endswith(IMAGE_ENDINGS):
            found.setdefault(match[1], {})[int(match[2])] = path
    patients = raw.get("patient_ids") or {}
    if not isinstance(patients, Mapping):
        raise LayoutError('the patient_ids of dataset.json are not of the form {"case": "patient", ...}; correct them')
    cases = []
    for position, (name, by_channel) in enumerate(found.items()):
        patient = _patient(patients.get(name), name)
        if patient is None:
            cases.append(unusable(LayoutError(f"case {position + 1} of {len(found)} has a patient that is no name")))
            continue
        expected = set(range(len(channels) or len(by_channel)))
        if set(by_channel) != expected:
            problem = LayoutError(
                f"case {position + 1} of {len(found)} has channels {sorted(by_channel)}; dataset.json expects "
                f"{sorted(expected)}"
            )
            cases.append(unusable(problem, patient, name))
            continue
        paths = tuple(by_channel[i] for i in sorted(by_channel))
        cases.append(Case(patient, name, paths, _label_file(labels, name)))
    return CaseIndex(tuple(cases), channels, label_names(raw), () if patients else (NO_PATIENTS,))


def read_json(path: Path, private: bool = False) -> dict[str, Any]:
    """Read a JSON object, or say in one sentence why it cannot be read.

    Args:
      private: the data are private, so that no value hides or stops the others; see `parse_private`.

    Raises:
      LayoutError: the file is missing, may not be read, or holds no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise LayoutError(f"{path.name} is missing from the data folder") from None
    except PermissionError:
        raise LayoutError(f"{path.name} may not be read by this user; change its permissions") from None
    raw = parse_private(content, path.name) if private else parse_json(content, path.name)
    if not isinstance(raw, dict):
        raise LayoutError(f"{path.name} holds a {type(raw).__name__}; expected an object")
    return raw


def parse_json(content: bytes, name: str) -> Any:
    """Return what a JSON file of data that are not private holds.

    Raises:
      LayoutError: it is not JSON, with the line; or holds a number of too many digits, or lists within lists.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LayoutError(f"{name} is not valid JSON{where}; correct it") from None
    except RecursionError:
        raise LayoutError(f"{name} nests lists or objects too deep to be read; correct it") from None
    except ValueError:
        raise LayoutError(f"{name} holds a number of too many digits; correct it") from None


def parse_private(content: bytes, name: str) -> Any:
    """Return what a JSON file of private data holds; a value that cannot be read spoils its own entry alone.

    A byte that is no UTF-8 becomes half of a surrogate pair, as in a CSV file, and so does a whole number of too many
    digits: neither is a name, a path or a class. The syntax as a whole, how deep it nests included, belongs to the
    file's header: it is refused in one sentence, without the line, which counts patients.

    Raises:
      LayoutError: the file is not JSON.
    """
    try:
        return json.loads(content.decode("utf-8-sig", errors="surrogateescape"), parse_int=_whole)
    except (ValueError, RecursionError):
        raise LayoutError(f"{name} is not valid JSON; correct it") from None


def holds_unreadable(value: Any) -> bool:
    """Say whether a value of `parse_private`, or one within it at any depth, could not be read."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str) and UNDECODED.search(part):
            return True
        if isinstance(part, Mapping):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            left += part
    return False


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_DIGITS else UNREADABLE


def channel_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Channel names of a dataset.json, in channel order."""
    named = raw.get("channel_names") or raw.get("modality") or {}
    if not isinstance(named, Mapping) or not all(VALUE.fullmatch(key) and int(key) >= 0 for key in named):
        raise LayoutError('the channels of dataset.json are not of the form {"0": "T1", ...}; correct channel_names')
    return tuple(str(named[key]) for key in sorted(named, key=int))


def label_names(raw: Mapping[str, Any]) -> dict[int, str]:
    """Names of the label values above 0, from {value: name} (Decathlon) or {name: value} (nnU-Net 2)."""
    named: dict[int, str] = {}
    labels = raw.get("labels") or {}
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        if VALUE.fullmatch(str(key)):
            named[int(key)] = str(value)
        elif isinstance(value, int):
            named[value] = str(key)
        else:
            raise LayoutError(
                f"label {str(key)[:40]!r} of dataset.json has the value {str(value)[:40]!r}; region-based labels are "
                "not supported, one number is"
            )
    return {value: name for value, name in sorted(named.items()) if value > 0}


def stem_of(path: Path) -> str:
    """File name without its image ending, .nii.gz included."""
    for ending in (".nii.gz", *IMAGE_ENDINGS):
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def _case(directory: Path, entry: Any, split: Split, position: int) -> Case:
    try:
        return _entry(directory, entry, split, position)
    except (
        TypeError,
        ValueError,
        IndexError,
        RecursionError,
    ) as error:  # a value that is no path spoils its own entry alone
        where = f"entry {position + 1} of 'training' in dataset.json"
        return unusable(LayoutError(f"{where} cannot be read ({type(error).__name__}); correct its values"))


def _entry(directory: Path, entry: Any, split: Split, position: int) -> Case:
    if not isinstance(entry, Mapping) or not entry.get("image"):
        problem = LayoutError(
            f"entry {position + 1} of 'training' in dataset.json has no 'image'; expected "
            f'{{"image": ..., "label": ...}}'
        )
        return unusable(problem)
    if holds_unreadable(entry):
        return unusable(LayoutError(f"entry {position + 1} of 'training' in dataset.json holds text that is no UTF-8"))
    image = entry["image"]
    images = tuple(directory / str(p) for p in (image if isinstance(image, list) else [image]))
    name = stem_of(images[0])
    label = entry.get("label")
    fields = {str(k): str(v) for k, v in entry.items() if k not in {"image", "label", "patient_id"}}
    target = label if isinstance(label, int) else directory / str(label) if label else None
    listed = image[0] if isinstance(image, list) else image
    patient = _patient(entry.get("patient_id"), own_patient(str(listed), fields.get("series_0", "")))
    if patient is None:
        return unusable(
            LayoutError(f"entry {position + 1} of 'training' in dataset.json has a patient_id that is no name")
        )
    return Case(patient, name, images, target, split, fields)


def own_patient(listed: str, series_uid: str = "") -> str:
    """Return the patient of an entry that names none, from its first image alone, as the list writes the path.

    NAME.nii.gz and imagesTr/NAME.nii.gz are NAME, to which other entries can refer in patient_id. Everything else is
    the whole path after './', because t1.png in two folders is of two patients; no given name starts so. A last part
    without an image ending, such as a DICOM folder's UID, is kept whole.
    """
    path = PurePosixPath(listed)
    if path.name.lower().endswith(IMAGE_ENDINGS):
        path = path.with_name(stem_of(Path(path.name)) or path.name)
    if path.name and not series_uid and path.parent in (PurePosixPath("."), PurePosixPath("imagesTr")):
        return path.name
    return f"{OWN}{path}/./{series_uid}" if series_uid else f"{OWN}{path}"


def _patient(given: Any, own: str) -> str | None:
    """Return a case's patient: its own where none is given, None where what is given is no name.

    Else each case of somebody whose name cannot be read would count as a patient of its own.
    """
    if given is None or given == "":
        return own
    name = patient_name(given)
    return f"{OWN}{name}" if name.startswith(OWN) else name or None


def _label_file(folder: Path, name: str) -> Path | None:
    return next(
        (folder / f"{name}{ending}" for ending in IMAGE_ENDINGS if (folder / f"{name}{ending}").is_file()), None
    )
