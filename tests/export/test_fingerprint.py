"""Fingerprints are of the images as their files hold them, and never of private ones."""

from __future__ import annotations

import numpy as np
import pytest

from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.export.fingerprint import fingerprint_of


@pytest.fixture
def folder(tmp_path):
    """Six pictures whose intensities are known: 0 to 99 in equal numbers, times ten in the second channel."""
    import nibabel as nib

    rng = np.random.default_rng(0)
    rows = ["patient_id,image,label"]
    for number in range(6):
        values = rng.permutation(np.repeat(np.arange(100, dtype=np.float32), 80)).reshape(20, 20, 20)
        image = np.stack([values, 10 * values], axis=-1)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"image{number}.nii.gz")
        nib.save(nib.Nifti1Image((values > 50).astype(np.uint8), np.eye(4)), tmp_path / f"label{number}.nii.gz")
        rows.append(f"p{number},image{number}.nii.gz,label{number}.nii.gz")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def open_data(folder, declared):
    run = parse_run_config(
        {
            "name": "intensities",
            "data": {
                "hospitals": [{"id": "h", "directory": str(folder), "declared": declared, "num_patients": 4}],
                "format": "manifest",
                "labels": {1: "bright"},
                "channels": ["a", "b"],
                "spacing_mm": 2.0,
                "intensity": "zscore",
            },
            "model": {"type": "unet3d", "features": [4, 8]},
            "training": {"patch_size_voxels": 8},
            "privacy": {"enable_dp": False},
        }
    )
    list_hospitals(run)
    return open_hospital_data(run, ("h",))


def test_intensities_before_preparation(folder):
    found = fingerprint_of(open_data(folder, "public"))
    assert found.num_images == 4
    assert found.origin == "4 public training images"
    first, second = found.channels
    assert first.mean == pytest.approx(49.5)
    assert first.std == pytest.approx(np.arange(100).std())
    assert first.percentiles == pytest.approx((0.99, 24.75, 49.5, 74.25, 98.01), abs=1)
    assert second.mean == pytest.approx(495)
    assert second.percentiles == pytest.approx([10 * value for value in first.percentiles])


def test_private_images_have_none(folder):
    assert fingerprint_of(open_data(folder, "private")) is None
