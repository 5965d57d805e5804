from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.errors import LayoutError


def test_decathlon_with_fields_patients_and_validation(decathlon):
    folder = decathlon(patient_id=["p1", "p1", "p2", "p3"], site=["x", "x", "y", "y"])
    raw = json.loads((folder / "dataset.json").read_text())
    raw["validation"] = [raw["training"].pop()]
    (folder / "dataset.json").write_text(json.dumps(raw))
    index = discover_cases(folder)
    assert [case.patient_id for case in index.cases] == ["p1", "p1", "p2", "p3"]
    assert [case.split for case in index.cases] == [None, None, None, "holdout"]
    assert index.cases[2].fields == {"site": "y"}
    assert index.channels == ("M0",)
    assert index.labels == {1: "core", 2: "rim"}
    assert index.problems == ()


def test_a_layout_without_patients_says_so(decathlon):
    assert "names no patients" in discover_cases(decathlon()).problems[0]


def test_order_of_the_list_does_not_change_the_cases(decathlon):
    folder = decathlon()
    before = discover_cases(folder).cases
    raw = json.loads((folder / "dataset.json").read_text())
    raw["training"].reverse()
    (folder / "dataset.json").write_text(json.dumps(raw))
    assert discover_cases(folder).cases == before


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_raw(tmp_path, write_nifti, version):
    voxels = np.zeros((4, 4, 4), np.float32)
    for name in ("brain_001", "brain_002"):
        for channel in range(2):
            write_nifti(tmp_path / f"imagesTr/{name}_{channel:04d}.nii.gz", voxels)
        write_nifti(tmp_path / f"labelsTr/{name}.nii.gz", voxels.astype(np.uint8))
    raw = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "lesion": 1},
        "file_ending": ".nii.gz",
    }
    if version == 1:
        listed = [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("brain_001", "brain_002")
        ]
        raw = {"modality": {"0": "T1", "1": "FLAIR"}, "labels": {"0": "background", "1": "lesion"}, "training": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(raw))
    index = discover_cases(tmp_path)
    assert index.channels == ("T1", "FLAIR")
    assert index.labels == {1: "lesion"}
    assert [len(case.images) for case in index.cases] == [2, 2]
    assert all(path.is_file() for case in index.cases for path in (*case.images, case.label))


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_csv_with_channel_columns_and_splits(tmp_path):
    rows = [
        {"patient_id": "p1", "image_T1": "a.nii", "image_T2": "b.nii", "label": "l.nii", "split": "train", "ward": "7"},
        {
            "patient_id": "p2",
            "image_T1": "c.nii",
            "image_T2": "d.nii",
            "label": "m.nii",
            "split": "Validation",
            "ward": "8",
        },
    ]
    write_csv(tmp_path / "manifest.csv", rows)
    index = discover_cases(tmp_path)
    assert index.channels == ("T1", "T2")
    assert [case.split for case in index.cases] == ["train", "holdout"]
    assert index.cases[0].images == (tmp_path / "a.nii", tmp_path / "b.nii")
    assert index.cases[1].fields == {"ward": "8"}


def test_csv_with_classes_and_joined_images(tmp_path):
    write_csv(tmp_path / "any-name.csv", [{"patient_id": "p", "images": "a.png;b.png", "label": "1"}])
    case = discover_cases(tmp_path).cases[0]
    assert case.label == 1
    assert [path.name for path in case.images] == ["a.png", "b.png"]


def test_json_manifest_names_channels_and_labels(tmp_path):
    rows = [{"patient_id": 7, "images": ["a.nrrd"], "label": "l.nrrd"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"channels": ["CT"], "labels": {"1": "liver"}, "cases": rows}))
    index = discover_cases(tmp_path)
    assert index.channels == ("CT",)
    assert index.labels == {1: "liver"}
    assert index.cases[0].patient_id == "7"


def test_dicom_folder_finds_labels_by_reference(tmp_path, dicom):
    """Two patients in one flat folder, one with SEG and one with RTSTRUCT, and a localiser beside."""
    for patient in ("P1", "P2"):
        ct = dicom(patient)
        for i, slice_ in enumerate(ct.slices):
            slice_.save_as(tmp_path / f"{patient}{i}.dcm")
        (ct.seg if patient == "P1" else ct.rtstruct)(tmp_path / f"{patient}label.dcm")
    localiser = dicom("P1")
    localiser.slices[0].SeriesDescription = "localiser"
    localiser.slices[0].save_as(tmp_path / "localiser.dcm")
    index = discover_cases(tmp_path)
    assert [case.patient_id for case in index.cases] == ["P1", "P2"]
    assert index.labels == {1: "lesion"}
    from medfl_ray.data.prepare.loading import read_case

    for case in index.cases:
        image, label = read_case(case, index.labels)
        assert np.array_equal(label.array, image.array > 500)


def test_dicom_series_in_one_frame_of_reference_become_channels(tmp_path, dicom):
    from pydicom.uid import generate_uid

    for patient in ("P1", "P2"):
        ct = dicom(patient)
        ct.save(tmp_path / patient / "first")
        ct.seg(tmp_path / patient / "label" / "seg.dcm")
        uid = generate_uid()
        for slice_ in ct.slices:
            slice_.SeriesInstanceUID, slice_.SeriesDescription, slice_.SOPInstanceUID = uid, "PET", generate_uid()
        ct.save(tmp_path / patient / "second")
    index = discover_cases(tmp_path, "dicom")
    assert index.channels == ("CT", "PET")
    assert [path.name for path in index.cases[0].images] == ["first", "second"]


def test_a_patient_without_label_is_left_out_and_said(tmp_path, dicom):
    labelled, bare = dicom("P1"), dicom("P2")
    labelled.save(tmp_path / "a")
    labelled.seg(tmp_path / "a" / "seg.dcm")
    bare.save(tmp_path / "b")
    index = discover_cases(tmp_path)
    assert len(index.cases) == 1
    assert "1 of 2 patients have no SEG or RTSTRUCT" in index.problems[0]


def test_dicom_without_patient_id_takes_the_top_folder(tmp_path, dicom):
    for folder in ("one", "two"):
        ct = dicom("")
        ct.save(tmp_path / folder / "series")
        ct.seg(tmp_path / folder / "seg.dcm")
    assert [case.patient_id for case in discover_cases(tmp_path).cases] == ["one", "two"]


def test_unknown_folder_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(LayoutError, match=r"no known layout; expected a Decathlon dataset\.json"):
        discover_cases(tmp_path)
