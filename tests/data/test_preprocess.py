from __future__ import annotations

import numpy as np
import pytest

from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.volume import Volume
from medfl_ray.errors import GeometryError, LabelError

VOXELS = np.random.default_rng(0).normal(10, 3, (2, 6, 8, 10)).astype(np.float32)
LPS = np.diag([-2.0, -2.0, 2.0, 1.0])


def test_orientation_turns_lps_to_ras():
    prepared = Preprocessing(intensity="none").prepare(Volume(VOXELS, LPS))
    assert np.array_equal(prepared.image, VOXELS[:, ::-1, ::-1])
    assert np.allclose(prepared.affine @ [5, 7, 0, 1], [0, 0, 0, 1])
    assert prepared.spacing_mm == (2.0, 2.0, 2.0)


def test_resampling_keeps_points_in_place_and_labels_whole():
    ball = np.linalg.norm(np.indices((20, 20, 20)) - 9.5, axis=0) < 6
    label = Volume((ball * 4).astype(np.float32)[None], LPS)
    image = Volume(ball[None].astype(np.float32), LPS)
    prepared = Preprocessing(intensity="none", spacing_mm=(1.0, 1.0, 4.0), label_values=(2, 4)).prepare(image, label)
    assert prepared.spacing_mm == pytest.approx((1.0, 1.0, 4.0))
    assert set(np.unique(prepared.label)) == {0, 2}
    centre = prepared.affine[:3, :3] @ np.argwhere(prepared.label).mean(axis=0) + prepared.affine[:3, 3]
    assert np.allclose(centre, (LPS @ [9.5, 9.5, 9.5, 1])[:3], atol=1.0)
    volume_ml = (prepared.label > 0).sum() * 4.0
    assert volume_ml == pytest.approx(ball.sum() * 8.0, rel=0.1)


def test_prediction_goes_back_to_the_original_grid_and_values():
    label = np.zeros((1, 6, 8, 10), np.float32)
    label[0, 1:4, 2:6, 3:8] = 4
    original = Volume(VOXELS, LPS)
    preparation = Preprocessing(label_values=(2, 4))
    prepared = preparation.prepare(original, Volume(label, LPS))
    assert np.array_equal(preparation.restore(prepared.label, prepared.affine, original), label[0])


def test_restore_in_two_dimensions():
    picture = Volume(VOXELS[:, 0], np.eye(4))
    preparation = Preprocessing(spatial_dims=2, orientation=None, spacing_mm=(0.5, 0.5))
    prepared = preparation.prepare(picture, Volume((picture.array[:1] > 10).astype(np.float32), np.eye(4)))
    restored = preparation.restore(prepared.label, prepared.affine, picture)
    assert restored.shape == (8, 10)
    assert (restored == (picture.array[0] > 10)).mean() > 0.9


def test_zscore_is_per_channel_of_one_volume():
    image = Preprocessing().prepare(Volume(VOXELS * np.array([1, 50], np.float32).reshape(2, 1, 1, 1), LPS)).image
    assert image.mean(axis=(1, 2, 3)) == pytest.approx([0, 0], abs=1e-4)
    assert image.std(axis=(1, 2, 3)) == pytest.approx([1, 1], abs=1e-4)


def test_window_and_percentile_end_at_zero_and_one():
    window = Preprocessing(intensity="window", window=(5.0, 15.0)).prepare(Volume(VOXELS, np.eye(4))).image
    assert np.allclose(window, np.clip((VOXELS - 5) / 10, 0, 1), atol=1e-6)
    percentile = Preprocessing(intensity="percentile").prepare(Volume(VOXELS, np.eye(4))).image
    assert (percentile.min(), percentile.max()) == (0, 1)


def test_a_constant_image_stays_finite():
    constant = Volume(np.full((1, 4, 4, 4), 7, np.float32), np.eye(4))
    for intensity in ("zscore", "percentile"):
        assert np.isfinite(Preprocessing(intensity=intensity).prepare(constant).image).all()


def test_it_survives_json():
    preparation = Preprocessing(
        spacing_mm=(1.0, 1.0, 2.0), channels=("CT",), label_values=(1, 5), intensity="window", window=(-100, 300)
    )
    assert Preprocessing.model_validate_json(preparation.model_dump_json()) == preparation


def test_unknown_label_value_is_named():
    label = Volume(np.full((1, 6, 8, 10), 3, np.float32), LPS)
    with pytest.raises(LabelError, match="value 3; expected 0"):
        Preprocessing(label_values=(1, 2)).prepare(Volume(VOXELS, LPS), label)


def test_wrong_channels_and_dimensions_are_named():
    with pytest.raises(GeometryError, match=r"2 channels; expected 1 \(CT\)"):
        Preprocessing(channels=("CT",)).prepare(Volume(VOXELS, LPS))
    with pytest.raises(GeometryError, match=r"data\.spatial_dims is 2"):
        Preprocessing(spatial_dims=2, orientation=None).prepare(Volume(VOXELS, LPS))
    with pytest.raises(GeometryError, match=r"data\.spatial_dims is 3"):
        Preprocessing().prepare(Volume(VOXELS[:, 0], LPS))


def test_one_slice_is_a_picture_in_two_dimensions():
    prepared = Preprocessing(spatial_dims=2, orientation=None).prepare(Volume(VOXELS[..., :1], LPS))
    assert prepared.image.shape == (2, 6, 8)
    assert prepared.spacing_mm == (2.0, 2.0)


@pytest.mark.parametrize(("axis", "spacing"), [(0, (3.0, 5.0)), (1, (2.0, 5.0)), (2, (2.0, 3.0))])
def test_one_slice_keeps_the_spacing_of_each_of_its_axes(axis, spacing):
    thin = Volume(VOXELS.take([0], axis=axis + 1), np.diag([2.0, 3.0, 5.0, 1.0]))
    preparation = Preprocessing(spatial_dims=2, orientation=None)
    assert preparation.prepare(thin).spacing_mm == spacing
    edges = [length for other, length in enumerate((6, 8, 10)) if other != axis]
    whole_mm = Preprocessing(spatial_dims=2, orientation=None, spacing_mm=(1.0, 1.0)).prepare(thin)
    # From the first voxel's middle to the last one's.
    assert whole_mm.image.shape[1:] == tuple((n - 1) * int(mm) + 1 for n, mm in zip(edges, spacing, strict=True))


def test_classes_follow_the_order_of_the_labels_and_not_of_their_values():
    values = np.zeros((1, 6, 8, 10), np.float32)
    values[0, 0, 0, :2] = 4, 2
    preparation = Preprocessing(orientation=None, intensity="none", label_values=(4, 2))
    image = Volume(VOXELS, np.eye(4))
    prepared = preparation.prepare(image, Volume(values, np.eye(4)))
    assert prepared.label[0, 0, :3].tolist() == [1, 2, 0]
    assert np.array_equal(preparation.restore(prepared.label, prepared.affine, image), values[0])
