"""medfl-ray predict: one image through a package, a run's folder or a registered model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from cli_runs import assert_one_clear_error
from clinic_service import write_threshold_model
from dicom_builder import DicomBuilder
from model_packages import model_package, write_package
from model_registry import lineage

from medfl_ray.store.registry.registry import Registry

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0.9, 0.1, -30], [0, -0.1, 2.0, 5], [0, 0, 0, 1.0]])


@pytest.fixture
def package(tmp_path):
    write_threshold_model(tmp_path / "bright")
    return tmp_path / "bright"


@pytest.fixture
def image(tmp_path):
    values = np.random.default_rng(0).normal(0, 10, (11, 13, 9)).astype(np.float32)
    values[2:7, 3:9, 2:6] += 500
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "image.nii.gz")
    return tmp_path / "image.nii.gz", (values > 100).astype(np.uint8)


def test_a_mask_is_written_beside_its_volumes(medfl, package, image):
    path, expected = image
    result = medfl("predict", path, "--model", package, "--output", "mask.nii.gz", "--overlay", "overlay.png")
    assert result.code == 0, result.err
    mask = nib.load("mask.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), expected)
    assert np.allclose(mask.affine, AFFINE, atol=1e-5)
    millilitres = expected.sum() * abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    assert f"liver: {millilitres:.2f} ml" in result.out
    assert Path("overlay.png").read_bytes().startswith(b"\x89PNG")


def test_a_dicom_folder_gives_a_dicom_seg(medfl, package, tmp_path):
    builder = DicomBuilder()
    folder = builder.save(tmp_path / "series")
    result = medfl("predict", folder, "--model", package)
    assert result.code == 0, result.err
    seg = pydicom.dcmread("segmentation.dcm")
    assert seg.Modality == "SEG"
    assert int(seg.pixel_array.sum()) == int((builder.stored * 2.0 - 1000 > 100).sum())
    assert builder.slices[0].PatientID not in result.out + result.err


def test_a_zip_gives_what_the_ending_or_the_option_says(medfl, package, tmp_path):
    folder = DicomBuilder().save(tmp_path / "series")
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert medfl("predict", tmp_path / "series.zip", "--model", package, "--output", "mask.nrrd").code == 0
    assert nrrd.read("mask.nrrd")[0].shape == DicomBuilder.shape
    options = ("--output", "plan.dcm", "--format", "rtstruct")
    assert medfl("predict", tmp_path / "series.zip", "--model", package, *options).code == 0
    assert pydicom.dcmread("plan.dcm").Modality == "RTSTRUCT"


@pytest.mark.ci  # exporting the smallest classifier takes half a minute
def test_a_classifier_prints_its_probabilities(medfl, tmp_path):
    package = model_package((16, 16, 16), "classification", labels={0: "healthy", 1: "ill"})
    write_package(tmp_path / "classifier", package)
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 16), np.float32), np.eye(4)), tmp_path / "image.nii")
    result = medfl("predict", tmp_path / "image.nii", "--model", tmp_path / "classifier")
    assert result.code == 0, result.err
    shares = [float(line.rpartition(" ")[2]) for line in result.out.splitlines() if line.startswith("class")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_a_registered_model_is_named_with_or_without_its_version(medfl, package, image, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDFL_REGISTRY", str(tmp_path / "registry"))
    books = Registry()
    books.register("bright", package, lineage())
    path, expected = image
    assert_one_clear_error(medfl("predict", path, "--model", "bright-other"), 1, "bright")
    result = medfl("predict", path, "--model", "bright@1", "--output", "mask.nii.gz")
    assert result.code == 0, result.err
    assert np.array_equal(np.asarray(nib.load("mask.nii.gz").dataobj), expected)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nowhere.nii", "--model", "bright"), 2, "no such file"),
        (("image.nii.gz", "--model", "folders/nothing"), 2, "no folder"),
        (("image.nii.gz", "--model", "unknown"), 1, "unknown"),
        (("image.nii.gz", "--model", "bright", "--output", "mask.exe"), 2, "ending"),
        (("image.nii.gz", "--model", "bright", "--format", "dicom-seg"), 2, "send the DICOM series"),
        (("image.nii.gz", "--model", "bright", "--output", "no/such/place.nii.gz"), 2, "cannot write"),
        (("image.nii.gz", "--model", "."), 1, "model.json"),
    ],
)
def test_mistakes_are_one_sentence(medfl, package, image, arguments, code, words):
    assert_one_clear_error(medfl("predict", *arguments), code, words)
