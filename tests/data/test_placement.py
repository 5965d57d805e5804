"""Placement and intensities are MONAI's, and the mask reaches the image's edge."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.intensity.array import NormalizeIntensity, ScaleIntensityRange, ScaleIntensityRangePercentiles
from monai.transforms.spatial.array import Orientation, Spacing

from medfl_ray.data.prepare.placement import AXES, normalise, place
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.volume import Volume
from medfl_ray.errors import GeometryError

VOXELS = np.random.default_rng(0).gamma(2, 50, (2, 7, 9, 12)).astype(np.float32)
TILT = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])


def affines():
    every = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
    for order, flips in every[::5]:  # each order of the axes, and each axis backwards
        affine = np.eye(4)
        affine[:3, :3] = TILT @ np.eye(3)[:, list(order)] @ np.diag(np.array(flips) * (0.9, 1.4, 3.1))
        affine[:3, 3] = [-20, 31.5, 7]
        yield affine


@pytest.mark.parametrize("spacing", [None, (1.7, 1.3, 2.1)])
def test_every_orientation_is_placed_as_monai_does(spacing):
    for affine in affines():
        tensor = MetaTensor(torch.from_numpy(VOXELS), affine=torch.from_numpy(affine))
        expected = Orientation(axcodes="RAS", labels=AXES)(tensor)
        if spacing is not None:
            expected = Spacing(pixdim=spacing, mode="bilinear", padding_mode="border", dtype=np.float32)(expected)
        found, placed = place(VOXELS, affine, "RAS", spacing, "bilinear")
        np.testing.assert_array_equal(found, expected.numpy())
        np.testing.assert_allclose(placed, expected.affine.numpy(), atol=1e-12)


def test_intensities_are_monais():
    tensor = torch.from_numpy(VOXELS)
    by_percentile = torch.stack([ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True)(c) for c in tensor])
    for intensity, expected in {
        "zscore": NormalizeIntensity(channel_wise=True)(tensor),
        "window": ScaleIntensityRange(40.0, 130.0, 0.0, 1.0, clip=True)(tensor),
        "percentile": by_percentile,
    }.items():
        found = normalise(VOXELS, intensity, (40.0, 130.0))
        np.testing.assert_allclose(found, np.asarray(expected), atol=2e-6, err_msg=intensity)
        assert found.dtype == np.float32


@pytest.mark.parametrize("spacing", [(1.3, 1.3, 1.3), (0.37, 2.9, 1.0), (2.0, 2.0, 2.0)])
def test_what_fills_the_prepared_image_fills_the_original(spacing):
    for affine in affines():
        original = Volume(VOXELS, affine)
        preparation = Preprocessing(spacing_mm=spacing)
        prepared = preparation.prepare(original)
        full = np.ones(prepared.image.shape[1:], dtype=np.uint8)
        assert preparation.restore(full, prepared.affine, original).all()


def test_preparation_without_resampling_needs_no_torch():
    code = (
        "import sys, numpy as np; from medfl_ray.data.prepare.preprocess import Preprocessing as P; "
        "from medfl_ray.data.volume import Volume as V; v = V(np.ones((1, 4, 5, 6), np.float32), np.eye(4)); "
        "p = P().prepare(v); P().restore(p.image[0].astype(np.uint8), p.affine, v); "
        "import medfl_ray.export.predictor, medfl_ray.export.onnx_session; "
        "print([m for m in ('torch', 'monai') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_size_at_another_spacing_is_known_before_anything_is_resampled():
    sheared = np.eye(4)
    sheared[:3, :3] = np.array([[1.0, 0.9, 0.0], [0.0, 0.4, 0.8], [0.0, 0.0, 0.6]]) * (2.0, 3.0, 1.5)
    for affine in [*affines(), sheared]:
        placed, _ = place(VOXELS, affine, "RAS", (1.7, 1.3, 2.1), "bilinear")
        same, _ = place(VOXELS, affine, "RAS", (1.7, 1.3, 2.1), "bilinear", max_voxels=placed.size)
        assert np.array_equal(same, placed)
        with pytest.raises(GeometryError, match="in 2 channels; at most"):
            place(VOXELS, affine, "RAS", (1.7, 1.3, 2.1), "bilinear", max_voxels=placed.size - 1)


@pytest.mark.parametrize("thickness_mm", [30.0, 1e12, 1e100])
def test_a_small_image_with_thick_voxels_is_refused_and_not_resampled(thickness_mm, monkeypatch):
    monkeypatch.setattr(Spacing, "__call__", lambda *_, **__: pytest.fail("it was resampled"))
    volume = Volume(VOXELS[:1, :7, :7, :7], np.diag([thickness_mm] * 3 + [1.0]))
    with pytest.raises(GeometryError, match="at most 1000000 in all are prepared"):
        Preprocessing(spacing_mm=(1.0, 1.0, 1.0)).prepare(volume, max_voxels=10**6)
