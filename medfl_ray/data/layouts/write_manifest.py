"""Write a partition as a manifest, so that it can be read, corrected and used again."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.layouts.partitions import split_holdout
from medfl_ray.errors import DataError


class Dealt(NamedTuple):
    """One hospital's part of a partition."""

    hospital: str
    train: tuple[Case, ...]
    holdout: tuple[Case, ...]

    def num_patients(self, side: tuple[Case, ...]) -> int:
        """Distinct patients of a side."""
        return len({case.patient_id for case in side})


def deal(parts: Mapping[str, tuple[Case, ...]], holdout_fraction: float, seed: int) -> list[Dealt]:
    """Hold patients out in every hospital of a partition."""
    return [Dealt(hospital, *split_holdout(cases, holdout_fraction, seed)) for hospital, cases in parts.items()]


def write_manifest(dealt: list[Dealt], index: CaseIndex, path: Path) -> None:
    """Write manifest.json, which names channels and labels too, or manifest.csv, by the ending of the path.

    Raises:
      DataError: the file cannot be written.
    """
    rows = [
        _row(case, part.hospital, side, path.parent)
        for part in dealt
        for side, cases in (("train", part.train), ("holdout", part.holdout))
        for case in cases
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            if path.suffix.lower() == ".csv":
                columns = list(dict.fromkeys(key for row in rows for key in row))
                writer = csv.DictWriter(stream, columns, restval="")
                writer.writeheader()
                writer.writerows({**row, "images": ";".join(row["images"])} for row in rows)
            else:
                labels = {str(value): name for value, name in index.labels.items()}
                json.dump({"channels": list(index.channels), "labels": labels, "cases": rows}, stream, indent=1)
    except OSError as error:
        raise DataError(f"cannot write {path.name!r}: {error.strerror}; check free space and permissions") from None


def _row(case: Case, hospital: str, side: str, folder: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    label = relative(case.label) if isinstance(case.label, Path) else case.label
    row: dict[str, Any] = {"patient_id": case.patient_id, "case_id": case.case_id, "hospital": hospital, "split": side}
    row |= {"images": [relative(path) for path in case.images], "label": "" if label is None else label}
    return row | {key: value for key, value in case.fields.items() if key not in row}
