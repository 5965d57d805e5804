"""What `data make` writes is what the readers read: voxels, position in space, labels, fields."""

import csv
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml

from medfl_ray.cli.data_make import FileFormat, Layout, make
from medfl_ray.data.formats.readers import read_label, read_volume
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.phantoms.render import Phantom, render_phantom
from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms
from medfl_ray.data.volume import Volume
from medfl_ray.errors import ConfigError, DataError

SIZE = 20


def written(out: Path, preset: str = "brain_tumour", **options: Any) -> list[str]:
    """Write two patients of two hospitals."""
    counts = {"num_hospitals": 3, "num_patients": 1, "size_voxels": SIZE, "seed": 5}
    return list(write_phantoms(out, phantom_set(preset, **(counts | options))))


def values_at(volume: Volume, truth: Phantom, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """The read values at the places of the phantom's voxels, and the phantom's own, both as [I, J, K]."""
    image = truth.image if truth.image.ndim == 4 else truth.image[..., None]
    index = np.indices(image.shape[1:]).reshape(3, -1)
    points = truth.affine @ np.vstack([index, np.ones(index.shape[1])])
    back = np.rint((np.linalg.inv(volume.affine) @ points)[:3]).astype(int)
    return volume.array[channel][tuple(back)].reshape(image.shape[1:]), image


@pytest.mark.parametrize(("file_format", "layout"), [
    ("nifti", "decathlon"), ("nrrd", "decathlon"), ("nifti", "nnunet"), ("nrrd", "nnunet"),
    ("nifti", "manifest"), ("nrrd", "manifest"), ("dicom", "manifest"),
])  # fmt: skip
def test_volumes_come_back_where_they_were(tmp_path: Path, file_format: str, layout: str) -> None:
    written(tmp_path / "set", file_format=file_format, layout=layout)
    index = discover_cases(tmp_path / "set")
    assert index.channels == ("T1", "T1c", "T2", "FLAIR")
    assert len(index.cases) == 3
    hospitals = {"university": 0, "county": 1, "cancer-centre": 2}
    for case in index.cases:
        phantom = render_phantom("brain_tumour", hospitals[case.case_id.split("_")[0]], 0, SIZE, 5)
        volumes = [read_volume(path) for path in case.images]
        for number in range(4):
            volume, channel = (volumes[0], number) if len(volumes) == 1 else (volumes[number], 0)
            found, expected = values_at(volume, phantom, channel)
            assert np.array_equal(found, expected[number])
        assert isinstance(case.label, Path)
        label = read_label(case.label, volumes[0], index.labels or phantom.labels)
        found, _ = values_at(label, phantom, 0)
        assert np.array_equal(found, phantom.label)


def test_layouts_keep_the_hospital_and_the_label_names(tmp_path: Path) -> None:
    written(tmp_path / "decathlon")
    index = discover_cases(tmp_path / "decathlon")
    assert index.labels == {1: "core", 2: "oedema"}
    assert {case.case_id: case.fields["hospital"] for case in index.cases} == {
        "university_0000": "university",
        "county_0000": "county",
        "cancer-centre_0000": "cancer-centre",
    }
    assert len({case.patient_id for case in index.cases}) == 3
    written(tmp_path / "nnunet", layout="nnunet")
    assert discover_cases(tmp_path / "nnunet").labels == {1: "core", 2: "oedema"}


@pytest.mark.parametrize("file_format", ["nifti", "nrrd", "png", "dicom"])
def test_slices_come_back_with_their_class(tmp_path: Path, file_format: str) -> None:
    written(tmp_path / "set", "tumour_slices", file_format=file_format, layout="manifest", num_hospitals=1)
    case = discover_cases(tmp_path / "set").cases[0]
    phantom = render_phantom("tumour_slices", 0, 0, SIZE, 5)
    assert int(str(case.label)) == phantom.label
    for number, path in enumerate(case.images):
        assert np.array_equal(np.squeeze(read_volume(path).array), phantom.image[number])


def test_dicom_series_are_valid_and_their_identifiers_made_up(tmp_path: Path) -> None:
    written(tmp_path / "a", file_format="dicom", layout="manifest", num_hospitals=1)
    files = sorted((tmp_path / "a").rglob("IM*.dcm"))
    assert len(files) == 4 * SIZE
    datasets = [pydicom.dcmread(path) for path in files]
    assert len({d.SOPInstanceUID for d in datasets}) == 4 * SIZE
    assert len({d.SeriesInstanceUID for d in datasets}) == 4
    assert len({d.StudyInstanceUID for d in datasets}) == len({d.FrameOfReferenceUID for d in datasets}) == 1
    assert all(
        d.SOPInstanceUID.is_valid and d.SOPInstanceUID == d.file_meta.MediaStorageSOPInstanceUID for d in datasets
    )
    assert {d.PatientID for d in datasets} == {"P000-0000"}
    assert {d.PatientBirthDate for d in datasets} == {""}
    segmentation = pydicom.dcmread(next((tmp_path / "a").rglob("label.dcm")))
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["core", "oedema"]
    assert segmentation.FrameOfReferenceUID == datasets[0].FrameOfReferenceUID
    referenced = {
        i.ReferencedSOPInstanceUID for i in segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced <= {d.SOPInstanceUID for d in datasets}


def test_uids_follow_the_seed(tmp_path: Path) -> None:
    def study(name: str, seed: int) -> str:
        written(tmp_path / name, file_format="dicom", layout="manifest", num_hospitals=1, seed=seed)
        return str(pydicom.dcmread(next((tmp_path / name).rglob("IM0001.dcm"))).StudyInstanceUID)

    assert study("a", 1) == study("b", 1) != study("c", 2)


def test_a_patient_without_tumour_gets_an_empty_segmentation(tmp_path: Path) -> None:
    preset = tmp_path / "well.yaml"
    preset.write_text(
        "name: well\nchannels: [FLAIR]\nlabels: {1: tumour}\nhospitals: [{name: clinic, prevalence: 0.0}]\n"
    )
    counts = {"num_hospitals": 1, "num_patients": 1, "size_voxels": 16, "seed": 0}
    list(write_phantoms(tmp_path / "set", phantom_set(preset, **counts, file_format="dicom", layout="manifest")))
    case = discover_cases(tmp_path / "set").cases[0]
    assert isinstance(case.label, Path)
    assert not read_label(case.label, read_volume(case.images[0]), {1: "tumour"}).array.any()


def test_exact_truth_is_kept_on_request(tmp_path: Path) -> None:
    written(tmp_path / "set", keep_truth=True)
    phantom = render_phantom("brain_tumour", 1, 0, SIZE, 5)
    stored: Any = nib.load(tmp_path / "set" / "truth" / "county_0000.nii.gz")
    assert np.array_equal(np.asarray(stored.dataobj), phantom.truth)
    assert not np.array_equal(phantom.truth, phantom.label)


def test_the_data_set_says_how_it_was_made(tmp_path: Path) -> None:
    written(tmp_path / "set")
    record = yaml.safe_load((tmp_path / "set" / "phantoms.yaml").read_text())
    assert record["declared"] == "synthetic"
    assert record["seed"] == 5
    assert [h["name"] for h in record["hospitals"]] == ["university", "county", "cancer-centre"]


@pytest.mark.parametrize(("preset", "file_format", "layout", "message"), [
    ("tumour_slices", "nifti", "decathlon", "no place for one class"),
    ("brain_tumour", "png", "manifest", "a PNG picture holds one slice"),
    ("brain_tumour", "dicom", "nnunet", "no place for DICOM series"),
])  # fmt: skip
def test_impossible_combinations_say_what_is_possible(preset: str, file_format: str, layout: str, message: str) -> None:
    options: dict[str, Any] = {"num_hospitals": 1, "num_patients": 1, "size_voxels": 16, "seed": 0}
    with pytest.raises(ConfigError, match=message):
        phantom_set(preset, **options, file_format=file_format, layout=layout)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="is not empty"):
        written(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_chooses_the_layout_and_names_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "set", "tumour_slices", hospitals=2, patients=2, size=16, file_format=FileFormat.PNG)
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "4 patients of 2 hospitals" in output
    assert "medfl-ray data inspect" in output
    with (tmp_path / "set" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} <= {"0", "1"}
    make(tmp_path / "volumes", hospitals=1, patients=1, size=16, layout=Layout.NNUNET)
    assert len(list((tmp_path / "volumes" / "imagesTr").iterdir())) == 4
