from __future__ import annotations

import nibabel as nib
import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image

from medfl_ray.data.formats.readers import read_label, read_volume
from medfl_ray.data.volume import Volume, same_grid

AFFINE = np.array([[0.0, -2.0, 0.0, 5.0], [1.5, 0.0, 0.0, -7.0], [0.0, 0.0, 3.0, 11.0], [0.0, 0.0, 0.0, 1.0]])
VOXELS = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def test_nifti_keeps_voxels_and_affine(tmp_path, write_nifti):
    volume = read_volume(write_nifti(tmp_path / "a.nii.gz", VOXELS, AFFINE))
    assert np.array_equal(volume.array, VOXELS[None])
    assert np.allclose(volume.affine, AFFINE)
    assert volume.spacing_mm == pytest.approx((1.5, 2.0, 3.0))


def test_fourth_axis_of_nifti_becomes_channels(tmp_path, write_nifti):
    volume = read_volume(write_nifti(tmp_path / "a.nii", np.stack([VOXELS, -VOXELS], axis=-1), AFFINE))
    assert volume.array.shape == (2, 4, 5, 6)
    assert np.array_equal(volume.array[1], -VOXELS)


@pytest.mark.parametrize(
    "shape", [(70, 3, 64, 2), (2, 30, 3, 2), (70, 3, 64)], ids=["planes", "thin planes", "no channels"]
)
@pytest.mark.parametrize("slope", [None, 0.5])
def test_voxels_of_every_layout_are_those_that_nibabel_reads(tmp_path, shape, slope):
    stored = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    image = nib.Nifti1Image(stored, AFFINE)
    if slope is not None:
        image.header.set_slope_inter(slope, 3.0)
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata(dtype=np.float32).reshape(*shape[:3], -1)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    assert np.array_equal(volume.array, np.moveaxis(expected, 3, 0))


@pytest.mark.parametrize(
    ("space", "signs"), [("left-posterior-superior", (-1, -1, 1)), ("RAS", (1, 1, 1)), ("LAS", (-1, 1, 1))]
)
def test_nrrd_in_any_space_lies_where_the_nifti_lies(tmp_path, space, signs):
    flip = np.diag(signs)
    header = {"space": space, "space directions": (flip @ AFFINE[:3, :3]).T, "space origin": flip @ AFFINE[:3, 3]}
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS, header)
    volume = read_volume(tmp_path / "a.nrrd")
    assert np.array_equal(volume.array, VOXELS[None])
    assert np.allclose(volume.affine, AFFINE)


def test_nrrd_axis_without_direction_becomes_channels(tmp_path):
    directions = np.vstack([[np.nan] * 3, AFFINE[:3, :3].T])
    header = {
        "space": "RAS",
        "space directions": directions,
        "space origin": AFFINE[:3, 3],
        "kinds": ["list", *["domain"] * 3],
    }
    nrrd.write(str(tmp_path / "a.nrrd"), np.stack([VOXELS, 2 * VOXELS]), header)
    volume = read_volume(tmp_path / "a.nrrd")
    assert np.array_equal(volume.array[1], 2 * VOXELS)
    assert np.allclose(volume.affine, AFFINE)


def test_nrrd_with_spacings_only(tmp_path):
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS, {"spacings": [1.0, 2.0, 3.0]})
    assert read_volume(tmp_path / "a.nrrd").spacing_mm == (1.0, 2.0, 3.0)


def test_pictures_of_every_kind(tmp_path):
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    colour = np.stack([grey, grey + 1, grey + 2, np.full_like(grey, 255)], axis=-1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    Image.fromarray(colour).save(tmp_path / "alpha.png")
    Image.fromarray(colour[..., :3]).save(tmp_path / "colour.jpg")
    tifffile.imwrite(tmp_path / "colour.tif", colour[..., :3], photometric="rgb")
    tifffile.imwrite(tmp_path / "pages.tiff", np.stack([grey] * 4).astype(np.float32), photometric="minisblack")
    assert np.array_equal(read_volume(tmp_path / "grey.png").array, grey[None])
    assert read_volume(tmp_path / "deep.png").array.max() == 29000
    assert np.array_equal(read_volume(tmp_path / "alpha.png").array, np.moveaxis(colour[..., :3], -1, 0))
    assert read_volume(tmp_path / "colour.jpg").array.shape == (3, 5, 6)
    assert np.array_equal(read_volume(tmp_path / "colour.tif").array[2], grey + 2)
    assert read_volume(tmp_path / "pages.tiff").array.shape == (1, 4, 5, 6)


def test_palette_picture_is_colour_as_image_and_index_as_label(tmp_path):
    index = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png")
    image = read_volume(tmp_path / "p.png")
    assert image.array[0].max() == 255
    label = read_label(tmp_path / "p.png", Volume(np.zeros((1, 2, 2), np.float32), np.eye(4)))
    assert np.array_equal(label.array[0], index)


def test_grids_agree_up_to_a_fifth_of_a_voxel():
    a = Volume(np.zeros((1, 4, 4, 4), np.float32), np.eye(4))
    near, far = np.eye(4), np.eye(4)
    near[0, 3], far[0, 3] = 0.1, 0.5
    assert same_grid(a, Volume(a.array, near))
    assert not same_grid(a, Volume(a.array, far))
