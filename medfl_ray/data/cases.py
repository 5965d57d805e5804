"""Cases: what a data layout lists and what preparation makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Case:
    """One examination of one patient, as a layout lists it; identifiers and paths stay out of its repr.

    `images` holds one path per channel, or one path whose file or DICOM folder has all channels. `label`
    is a path for segmentation, a class index for classification, None where a case has no label.
    """

    patient_id: str = field(repr=False)
    case_id: str = field(repr=False)
    images: tuple[Path, ...] = field(repr=False)
    label: Path | int | None = field(repr=False)
    split: Literal["train", "holdout"] | None = None
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)


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
