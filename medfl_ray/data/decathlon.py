"""The layouts of the Medical Segmentation Decathlon and of nnU-Net, both around a dataset.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.readers import IMAGE_ENDINGS
from medfl_ray.errors import LayoutError

Split = Literal["train", "holdout"] | None
NO_PATIENTS = (
    "the layout names no patients, so every case counts as one; add patient_id to dataset.json if some share one"
)


def read_decathlon(directory: Path) -> CaseIndex:
    """List the cases of a Decathlon folder; a key of an entry beside image and label becomes a field.

    Raises:
      LayoutError: dataset.json is missing, not JSON, or an entry has no image.
    """
    raw = read_json(directory / "dataset.json")
    entries: list[tuple[Any, Split]] = [(entry, None) for entry in raw.get("training") or []]
    entries += [
        (entry, "holdout") for entry in raw.get("validation") or [] if isinstance(entry, Mapping) and "label" in entry
    ]
    if not entries:
        raise LayoutError("dataset.json has no 'training' list; expected entries with 'image' and 'label'")
    cases = [_entry(directory, entry, split, i) for i, (entry, split) in enumerate(entries)]
    problems = (
        () if any("patient_id" in entry for entry, _ in entries if isinstance(entry, Mapping)) else (NO_PATIENTS,)
    )
    return CaseIndex(tuple(sorted(cases, key=lambda c: c.case_id)), channel_names(raw), label_names(raw), problems)


def read_nnunet(directory: Path) -> CaseIndex:
    """List the training cases of an nnU-Net raw folder, versions 1 and 2 of its dataset.json.

    Raises:
      LayoutError: a folder is missing or a case lacks one of its channels.
    """
    raw = read_json(directory / "dataset.json")
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
    cases = []
    for position, (name, by_channel) in enumerate(found.items()):
        expected = set(range(len(channels) or len(by_channel)))
        if set(by_channel) != expected:
            raise LayoutError(
                f"case {position + 1} of {len(found)} has channels {sorted(by_channel)}; dataset.json expects "
                f"{sorted(expected)}"
            )
        paths = tuple(by_channel[i] for i in sorted(by_channel))
        cases.append(Case(str(patients.get(name, name)), name, paths, _label_file(labels, name)))
    return CaseIndex(tuple(cases), channels, label_names(raw), () if patients else (NO_PATIENTS,))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say in one sentence why it cannot be read."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LayoutError(f"{path.name} is missing from the data folder") from None
    except PermissionError:
        raise LayoutError(f"{path.name} may not be read by this user; change its permissions") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LayoutError(f"{path.name} is not valid JSON{where}; correct it") from None
    if not isinstance(raw, dict):
        raise LayoutError(f"{path.name} holds a {type(raw).__name__}; expected an object")
    return raw


def channel_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Channel names of a dataset.json, in channel order."""
    named = raw.get("channel_names") or raw.get("modality") or {}
    if not isinstance(named, Mapping) or not all(str(key).isdigit() for key in named):
        raise LayoutError('the channels of dataset.json are not of the form {"0": "T1", ...}; correct channel_names')
    return tuple(str(named[key]) for key in sorted(named, key=int))


def label_names(raw: Mapping[str, Any]) -> dict[int, str]:
    """Names of the label values above 0, from {value: name} (Decathlon) or {name: value} (nnU-Net 2)."""
    named: dict[int, str] = {}
    labels = raw.get("labels") or {}
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        if str(key).lstrip("-").isdigit():
            named[int(key)] = str(value)
        elif isinstance(value, int):
            named[value] = str(key)
        else:
            raise LayoutError(
                f"label {key!r} of dataset.json has the value {value!r}; region-based labels are not supported, one "
                "number is"
            )
    return {value: name for value, name in sorted(named.items()) if value > 0}


def stem_of(path: Path) -> str:
    """File name without its image ending, .nii.gz included."""
    for ending in (".nii.gz", *IMAGE_ENDINGS):
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def _entry(directory: Path, entry: Any, split: Split, position: int) -> Case:
    if not isinstance(entry, Mapping) or not entry.get("image"):
        raise LayoutError(
            f"entry {position + 1} of 'training' in dataset.json has no 'image'; expected "
            f'{{"image": ..., "label": ...}}'
        )
    image = entry["image"]
    images = tuple(directory / str(p) for p in (image if isinstance(image, list) else [image]))
    name = stem_of(images[0])
    label = entry.get("label")
    fields = {str(k): str(v) for k, v in entry.items() if k not in {"image", "label", "patient_id"}}
    target = label if isinstance(label, int) else directory / str(label) if label else None
    return Case(str(entry.get("patient_id", name)), name, images, target, split, fields)


def _label_file(folder: Path, name: str) -> Path | None:
    return next(
        (folder / f"{name}{ending}" for ending in IMAGE_ENDINGS if (folder / f"{name}{ending}").is_file()), None
    )
