"""Builders of small real files: NIfTI, DICOM series, SEG and RTSTRUCT objects, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_builder import DicomBuilder

SHAPE = (10, 12, 8)


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def decathlon(tmp_path: Path, write_nifti: Callable[..., Path]) -> Callable[..., Path]:
    """Write a Decathlon folder of small cubes with a labelled box, one case per name."""

    def build(names: Sequence[str] = ("a", "b", "c", "d"), channels: int = 1, **extra: Any) -> Path:
        folder = tmp_path / "decathlon"
        rng = np.random.default_rng(0)
        entries = []
        for i, name in enumerate(names):
            label = np.zeros(SHAPE, np.uint8)
            label[2:6, 3:7, 2 : 4 + i % 3] = 1
            label[6:8, 3:7, 2:5] = 2
            image = (rng.normal(size=(*SHAPE, channels)) + label[..., None] * 5).astype(np.float32)
            write_nifti(folder / f"imagesTr/{name}.nii.gz", image if channels > 1 else image[..., 0])
            write_nifti(folder / f"labelsTr/{name}.nii.gz", label)
            entry = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
            entries.append(entry | {key: value[i] for key, value in extra.items()})
        index = {
            "modality": {str(i): f"M{i}" for i in range(channels)},
            "labels": {"0": "background", "1": "core", "2": "rim"},
            "training": entries,
        }
        (folder / "dataset.json").write_text(json.dumps(index))
        return folder

    return build


@pytest.fixture
def dicom() -> type[DicomBuilder]:
    return DicomBuilder


@pytest.fixture
def make_run() -> Callable[..., Any]:
    from medfl_ray.config.files import parse_run_config

    def build(data: dict[str, Any], **sections: Any) -> Any:
        raw = {"name": "test", "data": data, "privacy": {"enable_dp": False}} | sections
        return parse_run_config(raw)

    return build
