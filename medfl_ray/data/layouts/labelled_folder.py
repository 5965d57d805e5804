"""All labelled cases of a folder, prepared as a trained model wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medfl_ray.data.cases import Case
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.prepare.cache import PreparedCases
from medfl_ray.data.prepare.loading import CaseLoader, check_labelled, pick_channels
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.errors import LabelError


@dataclass(frozen=True)
class LabelledFolder:
    """Cases to evaluate on, with the names of the model's classes."""

    holdout: PreparedCases
    labels: Mapping[int, str]
    num_patients: int
    num_unlabelled: int
    cases: tuple[Case, ...]


def open_labelled_folder(
    directory: Path,
    format: str,
    task: Literal["segmentation", "classification"],
    preprocessing: Preprocessing,
    labels: Mapping[int, str],
) -> LabelledFolder:
    """List a folder's labelled cases, training and held-out alike; nothing is decoded yet.

    Args:
      labels: names of the model's classes above 0.

    Raises:
      LayoutError: the folder is not of a known layout.
      LabelError: no case has a label.
    """
    index = discover_cases(directory, format)
    labelled = [case for case in index.cases if case.label is not None]
    if not labelled:
        raise LabelError(f"none of the {len(index.cases)} cases in {directory.name!r} has a label to compare with")
    check_labelled(labelled, task)
    channels, picked = pick_channels(preprocessing.channels, index.channels)
    prepare = preprocessing.model_copy(update={"channels": channels})
    names = list(labels.values())
    values = dict(zip(preprocessing.label_values or labels, names, strict=True))

    def loader(position: int, case: Case) -> CaseLoader:
        return CaseLoader(case, prepare, picked, values, f"case {position} of {len(labelled)}")

    ordered = sorted(labelled, key=lambda case: (case.patient_id, case.case_id))
    loaders = [loader(labelled.index(case) + 1, case) for case in ordered]
    return LabelledFolder(
        PreparedCases(loaders, "none"),
        labels,
        len({case.patient_id for case in labelled}),
        len(index.cases) - len(labelled),
        tuple(ordered),
    )
