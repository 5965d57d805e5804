"""Write a data set of phantoms in one of the layouts that medfl-ray reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from medfl_ray.data.phantoms.preset import HospitalProfile, PhantomPreset, load_preset
from medfl_ray.data.phantoms.profiles import hospital_profile
from medfl_ray.data.phantoms.render import Phantom, render_phantom
from medfl_ray.data.phantoms.write_dicom import Examination, write_examination
from medfl_ray.data.phantoms.write_images import as_volume, write_array
from medfl_ray.errors import ConfigError, DataError

FileFormat = Literal["nifti", "nrrd", "png", "dicom"]
Layout = Literal["decathlon", "nnunet", "manifest"]
ENDINGS = {"nifti": ".nii.gz", "nrrd": ".nrrd", "png": ".png"}
PROVENANCE = "phantoms.yaml"


@dataclass(frozen=True)
class PhantomSet:
    """Which phantoms to render, and how to write them."""

    preset: PhantomPreset
    num_hospitals: int
    num_patients: int
    size_voxels: int
    seed: int
    labelmaps: Path | None = None
    file_format: FileFormat = "nifti"
    layout: Layout = "decathlon"
    keep_truth: bool = False

    def profile(self, hospital_index: int) -> HospitalProfile:
        """The profile of one of the hospitals."""
        return hospital_profile(self.preset, hospital_index, self.seed)

    def render(self) -> Iterator[RenderedCase]:
        """Render every patient, hospital by hospital."""
        for hospital in range(self.num_hospitals):
            profile = self.profile(hospital)
            for patient in range(self.num_patients):
                phantom = render_phantom(self.preset, hospital, patient, self.size_voxels, self.seed, self.labelmaps)
                yield RenderedCase(f"{profile.name}_{patient:04d}", profile, phantom)


@dataclass(frozen=True)
class RenderedCase:
    """One patient before writing."""

    case_id: str
    profile: HospitalProfile
    phantom: Phantom


def phantom_set(preset: str | Path | PhantomPreset, **options: Any) -> PhantomSet:
    """Build a `PhantomSet` and check that its format and layout can hold the preset.

    Raises:
      ConfigError: the combination does not exist, with the one that does.
    """
    chosen = PhantomSet(load_preset(preset), **options)
    if chosen.preset.task == "classification" and chosen.layout != "manifest":
        raise ConfigError(f"layout {chosen.layout!r} has no place for one class per image; use --layout manifest")
    if chosen.preset.spatial_dims == 3 and chosen.file_format == "png":
        raise ConfigError(
            "a PNG picture holds one slice, and this preset renders volumes; use --format nifti, nrrd or dicom"
        )
    if chosen.file_format == "dicom" and chosen.layout != "manifest":
        raise ConfigError(f"layout {chosen.layout!r} has no place for DICOM series; use --layout manifest")
    return chosen


def write_phantoms(out: Path, phantoms: PhantomSet) -> Iterator[str]:
    """Write the data set into a new or empty folder, yielding the name of every case when it is on disk.

    Raises:
      DataError: the folder is not empty or cannot be written.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"the folder {out.name!r} is not empty; give a new folder, so that no data are overwritten")
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for case in phantoms.render():
            rows.append(_WRITERS[phantoms.layout](out, case, phantoms))
            if phantoms.keep_truth and not isinstance(case.phantom.truth, int):
                write_array(out / "truth" / f"{case.case_id}.nii.gz", case.phantom.truth, case.phantom.affine)
            yield case.case_id
        _INDEXES[phantoms.layout](out, rows, phantoms)
        _write_provenance(out, phantoms)
    except OSError as error:
        raise DataError(f"cannot write into {out.name!r}: {error.strerror}; check free space and permissions") from None


def _write_decathlon(out: Path, case: RenderedCase, phantoms: PhantomSet) -> dict[str, str]:
    ending = ENDINGS[phantoms.file_format]
    image, label = f"imagesTr/{case.case_id}{ending}", f"labelsTr/{case.case_id}{ending}"
    write_array(out / image, case.phantom.image, case.phantom.affine)
    write_array(out / label, np.asarray(case.phantom.label, dtype=np.uint8), case.phantom.affine)
    return {"image": image, "label": label, "patient_id": case.phantom.patient_id, "hospital": case.profile.name}


def _index_decathlon(out: Path, rows: list[dict[str, str]], phantoms: PhantomSet) -> None:
    ending = ENDINGS[phantoms.file_format]
    index = {
        "name": phantoms.preset.name,
        "description": "synthetic head MR with exact truth",
        "tensorImageSize": "4D",
        "modality": {str(i): name for i, name in enumerate(phantoms.preset.channels)},
        "labels": {"0": "background"} | {str(value): name for value, name in phantoms.preset.labels.items()},
        "file_ending": ending,
        "numTraining": len(rows),
        "numTest": 0,
        "training": rows,
        "test": [],
    }
    _write_json(out / "dataset.json", index)


def _write_nnunet(out: Path, case: RenderedCase, phantoms: PhantomSet) -> dict[str, str]:
    ending = ENDINGS[phantoms.file_format]
    for index, channel in enumerate(case.phantom.image):
        write_array(out / "imagesTr" / f"{case.case_id}_{index:04d}{ending}", channel, case.phantom.affine)
    label = np.asarray(case.phantom.label, dtype=np.uint8)
    write_array(out / "labelsTr" / f"{case.case_id}{ending}", label, case.phantom.affine)
    return {}


def _index_nnunet(out: Path, rows: list[dict[str, str]], phantoms: PhantomSet) -> None:
    index = {
        "channel_names": {str(i): name for i, name in enumerate(phantoms.preset.channels)},
        "labels": {"background": 0} | {name: value for value, name in phantoms.preset.labels.items()},
        "numTraining": len(rows),
        "file_ending": ENDINGS[phantoms.file_format],
    }
    _write_json(out / "dataset.json", index)


def _write_manifest(out: Path, case: RenderedCase, phantoms: PhantomSet) -> dict[str, str]:
    phantom, row = case.phantom, {"patient_id": case.phantom.patient_id, "case_id": case.case_id}
    if phantoms.file_format == "dicom":
        who = Examination(
            phantom.patient_id,
            case.profile.name,
            case.profile,
            (phantoms.preset.name, str(phantoms.seed), case.case_id),
        )
        segmentation = write_examination(out / "images" / case.case_id, phantom, who)
        images = [f"images/{case.case_id}/{channel}" for channel in phantom.channels]
        label = str(segmentation.relative_to(out)) if segmentation else str(phantom.label)
    else:
        ending = ENDINGS[phantoms.file_format]
        images = [f"images/{case.case_id}_{channel}{ending}" for channel in phantom.channels]
        volume, affine = as_volume(phantom)
        for path, channel_array in zip(images, volume, strict=True):
            write_array(out / path, channel_array, affine)
        label = str(phantom.label)
        if not isinstance(phantom.label, int):
            label = f"labels/{case.case_id}{ending}"
            write_array(out / label, phantom.label, affine)
    row |= {f"image_{name}": path for name, path in zip(phantom.channels, images, strict=True)}
    return row | {"label": label, "hospital": case.profile.name}


def _index_manifest(out: Path, rows: list[dict[str, str]], phantoms: PhantomSet) -> None:
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


_WRITERS = {"decathlon": _write_decathlon, "nnunet": _write_nnunet, "manifest": _write_manifest}
_INDEXES = {"decathlon": _index_decathlon, "nnunet": _index_nnunet, "manifest": _index_manifest}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_provenance(out: Path, phantoms: PhantomSet) -> None:
    """Say how the data set was made, so that it can be made again."""
    record = {
        "declared": "synthetic",
        "preset": phantoms.preset.model_dump(mode="json", exclude={"hospitals"}),
        "seed": phantoms.seed,
        "size_voxels": phantoms.size_voxels,
        "patients_per_hospital": phantoms.num_patients,
        "anatomy": "label maps" if phantoms.labelmaps else "MNI152 (ICBM 2009a, as nilearn ships it)",
        "hospitals": [phantoms.profile(i).model_dump(mode="json") for i in range(phantoms.num_hospitals)],
    }
    (out / PROVENANCE).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
