"""Files in, masks out, beside MONAI's own transforms, inferer and inverse in torch.

Twenty volumes of odd sizes, spacings and orientations: real ones where their folder is beside the checkout, phantoms,
and both as oblique, flipped and anisotropic scans. The masks are read back from their files by the standard's offsets,
and compared at every voxel that has one nearest prepared voxel.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from model_packages import model_package, write_package
from monai.data.meta_tensor import MetaTensor
from monai.inferers.utils import sliding_window_inference
from monai.transforms.intensity.array import NormalizeIntensity
from monai.transforms.spatial.array import Orientation, Spacing

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.phantoms.render import render_phantom
from medfl_ray.data.results.mask_files import write_mask
from medfl_ray.data.uploads.read import Upload
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.predictor import Predictor
from medfl_ray.training.scoring.evaluation import dice_per_label

REAL = Path(__file__).parents[2].parent / "shared" / "data"
WINDOW = (32, 32, 32)
# No ratio of spacings is a simple fraction, so that few voxels lie halfway between two others.
SPACING = (1.7123, 1.3071, 2.0937)
AXES = (("L", "R"), ("P", "A"), ("I", "S"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real images is not beside the checkout")
MIN_DICE = 0.999

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A model whose masks are all but smooth, so that a shift of a voxel is seen."""
    folder = tmp_path_factory.mktemp("package")
    network = write_package(folder, model_package(WINDOW, spacing_mm=SPACING), seed=3)
    return Predictor(OnnxModel.open(folder)), network


def turned(axes, flips, spacing, tilt_degrees):
    """Return an affine: which axis is which, which run backwards, voxel size, and a tilt about two axes."""
    angle = np.deg2rad(tilt_degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.eye(3)[:, list(axes)] @ np.diag(np.array(flips) * spacing)
    affine[:3, 3] = [-71.3, 12.9, 104.6]
    return affine


GRIDS = {
    "as-it-is": None,
    "flipped": turned((0, 1, 2), (-1, -1, 1), (1.0, 1.0, 1.0), 0),
    "sagittal": turned((2, 0, 1), (1, -1, -1), (2.6, 0.9, 0.9), 0),
    "oblique": turned((0, 1, 2), (1, 1, 1), (1.1, 0.9, 1.6), 17),
    "oblique-coronal": turned((0, 2, 1), (-1, 1, 1), (0.8, 0.8, 4.3), -28),
}
REAL_IMAGES = [
    "hippocampus_msd/imagesTr/hippocampus_004.nii.gz", "hippocampus_msd/imagesTr/hippocampus_011.nii.gz",
    "ct_mr_totalsegmentator/ct_a/image.nii.gz", "ct_mr_totalsegmentator/mr_a/image.nii.gz",
]  # fmt: skip
REAL_VOLUMES = [(name, grid) for name in REAL_IMAGES for grid in ("as-it-is", "sagittal", "oblique")]
PHANTOMS = [(index, grid) for index, grid in enumerate([*list(GRIDS)[1:], *list(GRIDS)[1:]])]


def real_image(name, grid, folder):
    image = nib.load(REAL / name)
    voxels = np.asanyarray(image.dataobj, dtype=np.float32)
    return save(voxels, image.affine if GRIDS[grid] is None else GRIDS[grid], folder)


def phantom_image(index, grid, folder):
    voxels = render_phantom("brain_glioma_demo", index % 2, index, size_voxels=48).image[0]
    return save(voxels[: 41 + index, index : 37 + index, 3 : 30 - index], GRIDS[grid], folder)


def save(voxels, affine, folder):
    path = folder / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels, dtype=np.float32), affine), path)
    return path


def mask_of_monai(path, network):
    """The mask by MONAI's own pipeline, in label values."""
    spacing = Spacing(pixdim=SPACING, mode="bilinear", padding_mode="border", dtype=np.float32)
    orientation = Orientation(axcodes="RAS", labels=AXES)
    image = nib.load(path)
    voxels = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None]
    placed = spacing(orientation(MetaTensor(voxels, affine=torch.from_numpy(image.affine))))
    image = NormalizeIntensity(channel_wise=True)(torch.as_tensor(placed.numpy()))
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.as_tensor(image)[None], WINDOW, 4, network, overlap=0.25, mode="gaussian", padding_mode="constant"
        )
    classes = MetaTensor(logits[0].argmax(0, keepdim=True).float(), meta=placed.meta)
    classes.applied_operations = placed.applied_operations
    spacing.mode = "nearest"
    for operation in classes.applied_operations:
        if "mode" in operation.get("extra_info", {}):
            operation["extra_info"]["mode"] = "nearest"
    return 10 * orientation.inverse(spacing.inverse(classes))[0].numpy().astype(np.uint8)


def halfway(predictor, volume):
    """Tell which voxels [*S] lie between two prepared ones, so that either is the nearest; at most one in ten."""
    placed = np.linalg.inv(predictor.description.preprocessing.prepare(volume).affine) @ volume.affine
    voxels = np.indices(volume.spatial_shape).reshape(3, -1)
    distance = np.abs((placed[:3, :3] @ voxels + placed[:3, 3:]) % 1 - 0.5)
    between = (distance.min(axis=0) < 1e-5).reshape(volume.spatial_shape)
    assert between.mean() < 0.1
    return between


def placed_mask(content):
    """Read voxels and sform of a NIfTI-1 file by the standard's offsets alone."""
    raw = gzip.decompress(content)
    rank, *shape = struct.unpack_from("<8h", raw, 40)[:4]
    assert (raw[344:347], rank, struct.unpack_from("<h", raw, 70)[0]) == (b"n+1", 3, 2)
    affine = np.vstack([np.reshape(struct.unpack_from("<12f", raw, 280), (3, 4)), [0, 0, 0, 1]])
    offset = int(struct.unpack_from("<f", raw, 108)[0])
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape, order="F"), affine


def compare(trial, path):
    predictor, network = trial
    volume = read_volume(path)
    result = predictor.segment(volume)
    expected = mask_of_monai(path, network)
    found, affine = placed_mask(write_mask(result.mask, Upload(volume, "nifti"), result.labels, "nifti"))
    assert found.shape == nib.load(path).shape
    np.testing.assert_array_equal(affine, nib.load(path).affine.astype(np.float32))
    sure = ~halfway(predictor, volume)
    scores = dice_per_label(found[sure], expected[sure], result.labels)
    assert min(scores.values()) >= MIN_DICE, scores
    assert min((expected == value).sum() for value in (0, *result.labels)) > 100, "the mask says too little"


@pytest.mark.parametrize(("index", "grid"), PHANTOMS)
def test_masks_of_phantoms(trial, tmp_path, index, grid):
    compare(trial, phantom_image(index, grid, tmp_path))


@pytest.mark.realdata
@needs_real
@pytest.mark.parametrize(("name", "grid"), REAL_VOLUMES)
def test_masks_of_real_images(trial, tmp_path, name, grid):
    compare(trial, real_image(name, grid, tmp_path))


def test_there_are_twenty():
    assert len(REAL_VOLUMES) + len(PHANTOMS) == 20
