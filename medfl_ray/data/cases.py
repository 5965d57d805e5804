"""Cases: what a data layout lists and what preparation makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import DataError


@dataclass(frozen=True)
class Case:
    """One examination of one patient, as a layout lists it; identifiers and paths stay out of its repr.

    `images` holds one path per channel, or one path whose file or DICOM folder has all channels. `label`
    is a path for segmentation, a class index for classification, None where a case has no label. `series` holds, where
    a DICOM folder was sorted by patients, the files of each channel. `problem` says why the layout cannot use the case.
    """

    patient_id: str = field(repr=False)
    case_id: str = field(repr=False)
    images: tuple[Path, ...] = field(repr=False)
    label: Path | int | None = field(repr=False)
    split: Literal["train", "holdout"] | None = None
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)
    series: tuple[tuple[Path, ...], ...] = field(default=(), repr=False)
    problem: DataError | None = field(default=None, repr=False, compare=False)


def unusable(problem: DataError, patient_id: str = "", case_id: str = "") -> Case:
    """Return a case of which a layout knows nothing but why it cannot be used."""
    return Case(patient_id, case_id, (), None, problem=problem)


def patient_name(value: object) -> str:
    """Return a patient's name as a list gives it, text or a number; empty where it is neither, or no Unicode."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    name = str(value)
    return name if name.strip() and name == name.encode("utf-8", "replace").decode() else ""


@dataclass(frozen=True)
class CaseIndex:
    """Everything a layout says of a folder; `problems` are sentences for the data's owner."""

    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    labels: dict[int, str]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One case after preparation: image [C, *S] float32, label [*S] uint8 or a class index."""

    patient_id: str = field(repr=False)
    case_id: str = field(repr=False)
    image: npt.NDArray[np.float32] = field(repr=False)
    label: npt.NDArray[np.uint8] | int | None = field(repr=False)
    affine: npt.NDArray[np.float64] = field(repr=False)
    spacing_mm: tuple[float, ...] = ()
