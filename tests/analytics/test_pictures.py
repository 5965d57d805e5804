"""Pictures of predictions: the right slice, the right way round, and a valid PNG for every task."""

import io

import numpy as np
import pytest
from PIL import Image

from medfl_ray.analytics.pictures import axial_planes, informative_channel, prediction_png

LABELS = {1: "core", 2: "oedema"}


def a_case(shape=(24, 20, 12)):
    rng = np.random.default_rng(0)
    label = np.zeros(shape, dtype=np.uint8)
    label[8:14, 6:12, 5:8] = 2
    label[10:12, 8:10, 5:8] = 1
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    image[1] += 5 * (label > 0)
    return image, label


def read(png):
    picture = Image.open(io.BytesIO(png))
    picture.load()
    assert picture.format == "PNG"
    return picture


def test_the_slice_with_the_largest_region_is_cut():
    volume = np.zeros((5, 4, 4), dtype=np.int64)
    volume[1, 0, 0] = 1
    volume[3, 1:3, 1:3] = 1
    (plane,), aspect = axial_planes([volume], volume, None)
    assert plane.tolist() == volume[3].tolist()
    assert aspect == 1


def test_the_affine_finds_the_axial_axis_and_the_sides():
    # Index axes: z downwards, x to the right, y to the front; voxels 1 x 2 x 3 mm.
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    region = np.zeros_like(volume)
    region[1, 2, 3] = 1  # rightmost and frontmost voxel
    (plane,), aspect = axial_planes([volume], region, affine)
    assert plane.shape == (4, 3)
    assert plane[0, 0] == volume[1, 2, 3]  # front on top, the patient's right on the left
    assert aspect == pytest.approx(1.5)


def test_without_a_region_the_middle_slice_is_cut():
    volume = np.arange(5)[:, None, None] * np.ones((5, 2, 2))
    (plane,), _ = axial_planes([volume], np.zeros((5, 2, 2), dtype=int), None)
    assert plane[0, 0] == 2


def test_the_channel_in_which_the_region_stands_out():
    image, label = a_case()
    assert informative_channel(image, label) == 1
    assert informative_channel(image, np.zeros_like(label)) == 0


def test_segmentation_in_3d_and_2d():
    image, label = a_case()
    wide = read(
        prediction_png(image, label, np.roll(label, 1, axis=0), LABELS, affine=np.eye(4), channels=("T1", "T2"))
    )
    assert wide.width > wide.height
    plane = image[..., 6], label[..., 6]
    read(prediction_png(plane[0], plane[1], plane[1], LABELS))


def test_an_empty_prediction_a_flat_image_and_a_missing_truth():
    image, label = a_case()
    empty = np.zeros_like(label)
    read(prediction_png(image, empty, empty, LABELS))
    read(prediction_png(np.zeros_like(image), label, empty, LABELS))
    three = read(prediction_png(image, label, label, LABELS))
    two = read(prediction_png(image, None, label, LABELS))
    assert two.width < three.width


def test_a_label_that_fills_the_picture():
    image, label = a_case()
    read(prediction_png(image, np.ones_like(label), np.ones_like(label), {1: "all"}))


@pytest.mark.parametrize("prediction", [np.array(1), np.array([0.3, 0.7]), 0])
def test_classification(prediction):
    image, _ = a_case()
    read(prediction_png(image[..., 6], 1, prediction, {0: "none", 1: "tumour"}, channels=("T1", "T2")))
