"""Readers and preparation on real images, where the folder of them is beside the checkout."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from medfl_ray.data.formats.readers import read_label, read_volume
from medfl_ray.data.inspection import inspect_folder
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.data.volume import Volume

REAL = Path(__file__).parents[2].parent / "shared" / "data"
HIPPOCAMPUS = REAL / "hippocampus_msd"
DICOM = REAL / "dicom_highdicom"
TOTAL = REAL / "ct_mr_totalsegmentator"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real images is not beside the checkout"),
]


def test_hippocampus_strata_become_hospitals_within_a_minute(make_run):
    run = make_run(
        {
            "directory": str(HIPPOCAMPUS),
            "declared": "public",
            "partition": {"by": "field", "field": "intensity_stratum"},
        }
    )
    policies = list_hospitals(run)
    assert {p.hospital: p.num_patients for p in policies} == {"float_hi": 19, "float_lo": 99, "uint8": 32}
    data = open_hospital_data(run, tuple(p.hospital for p in policies))
    start = time.monotonic()
    data.decode(2)
    assert time.monotonic() - start < 60
    assert (data.num_train_patients, len(data.holdout)) == (150, 49)
    for case in data.holdout:
        assert case.image.std() == pytest.approx(1, abs=1e-3)
        assert set(np.unique(case.label)) == {0, 1, 2}


def test_anterior_lies_in_front_of_posterior():
    """A flipped axis would turn this round: after RAS orientation the second axis runs to the front."""
    from medfl_ray.data.prepare.preprocess import Preprocessing

    for name in ("hippocampus_004", "hippocampus_190"):
        image = read_volume(HIPPOCAMPUS / f"imagesTr/{name}.nii.gz")
        label = read_label(HIPPOCAMPUS / f"labelsTr/{name}.nii.gz", image)
        classes = Preprocessing(label_values=(1, 2)).prepare(image, label).label
        assert np.argwhere(classes == 1)[:, 1].mean() > np.argwhere(classes == 2)[:, 1].mean() + 5


def test_hippocampus_volumes_are_those_of_adults():
    found = inspect_folder(HIPPOCAMPUS)
    assert found.num_unusable == 0
    totals = [sum(case.label_ml.values()) for case in found.cases]
    assert 2.0 < min(totals) < max(totals) < 5.5


@pytest.mark.parametrize(("folder", "label"), [("ct_a", "label117"), ("mr_a", "label50")])
def test_whole_body_volumes(folder, label):
    image = read_volume(TOTAL / folder / "image.nii.gz")
    values = read_label(TOTAL / folder / f"{label}.nii.gz", image)
    assert values.spatial_shape == image.spatial_shape
    assert values.array.max() > 1
    if folder == "ct_a":
        assert -1100 <= image.array.min() < -500  # air, in Hounsfield units
        assert np.median(image.array[values.array > 0]) > -200


def test_ct_segmentation_of_highdicom_lies_on_its_image():
    """The CT slice is one of pydicom's samples; the segmentation is of a volume around it."""
    image = read_volume(DICOM / "ct_image.dcm")
    assert image.spatial_shape == (1, 128, 128)
    assert image.spacing_mm == pytest.approx((5.0, 0.661468, 0.661468))
    assert image.array.min() >= -1100
    label = read_label(DICOM / "seg_image_ct_binary_single_frame.dcm", Volume(image.array[:, 0], np.eye(4)))
    assert 0 < label.array.sum() < label.array.size


@pytest.mark.parametrize("name", ["binary", "binary_overlap", "binary_fractional", "true_fractional"])
def test_every_kind_of_segmentation_is_read(name):
    import highdicom

    path = DICOM / f"seg_image_ct_{name}.dcm"
    segmentation = highdicom.seg.segread(path)
    grid = segmentation.get_volume_geometry()
    assert grid is not None
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    reference = Volume(np.zeros((1, *grid.spatial_shape), np.float32), lps_to_ras @ grid.affine)
    label = read_label(path, reference)
    stored = segmentation.get_volume(combine_segments=False, rescale_fractional=True).array
    expected = np.zeros(grid.spatial_shape)
    for i, number in enumerate(segmentation.segment_numbers):
        expected[stored[..., i] >= 0.5] = number
    assert np.array_equal(label.array[0], expected)
    assert label.array.any()
    assert bool(label.notes) == (name == "binary_overlap")


def test_slides_are_pictures_of_three_channels():
    plain, compressed = (read_volume(DICOM / name) for name in ("sm_image.dcm", "sm_image_jpegls.dcm"))
    assert plain.array.shape == compressed.array.shape == (3, 50, 50)
    assert read_volume(DICOM / "sm_image_grayscale.dcm").array.shape[0] == 1


def test_plain_radiograph_is_two_dimensional():
    volume = read_volume(DICOM / "dx_image.dcm")
    assert volume.spatial_shape == (169, 211)
