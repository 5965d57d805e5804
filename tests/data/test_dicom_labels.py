from __future__ import annotations

import numpy as np
import pytest

from medfl_ray.data.formats.dicom_labels import name_segments
from medfl_ray.data.formats.readers import read_label, read_volume
from medfl_ray.data.volume import Volume
from medfl_ray.errors import GeometryError, LabelError


def bright(volume):
    return (volume.array > 500).astype(np.float32)


def test_seg_covers_the_bright_box_exactly(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    label = read_label(ct.seg(tmp_path / "seg.dcm"), image)
    assert np.array_equal(label.array, bright(image))


def test_rtstruct_covers_the_bright_box_exactly(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    label = read_label(ct.rtstruct(tmp_path / "rt.dcm"), image)
    assert np.array_equal(label.array, bright(image))


def test_labels_follow_their_image_into_ras(tmp_path, dicom, write_nifti):
    """The same box by DICOM SEG and as a NIfTI written by hand in RAS ends at the same points in space."""
    from medfl_ray.data.prepare.preprocess import Preprocessing

    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    flipped = ct.affine_ras.copy()
    flipped[:3, 0] *= -1
    flipped[:3, 3] += ct.affine_ras[:3, 0] * (ct.shape[0] - 1)
    other = read_volume(write_nifti(tmp_path / "a.nii.gz", (ct.stored[::-1] * 2.0 - 1000).astype(np.float32), flipped))
    preparation = Preprocessing(intensity="none", label_values=(1,))
    by_dicom = preparation.prepare(image, read_label(ct.seg(tmp_path / "seg.dcm"), image))
    by_nifti = preparation.prepare(other)
    assert np.allclose(by_dicom.image, by_nifti.image)
    assert np.allclose(by_dicom.affine, by_nifti.affine, atol=1e-3)
    assert np.array_equal(by_dicom.label, by_nifti.image[0] > 500)


def test_a_contour_inside_another_cuts_a_hole(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    path = ct.rtstruct(tmp_path / "rt.dcm", {"ring": [ct.outline(2), ct.outline(2, shrink=1.0)]})
    label = read_label(path, image).array[0, 2]
    expected = np.zeros(label.shape)
    expected[3:7, 2:6] = 1
    expected[4:6, 3:5] = 0
    assert np.array_equal(label, expected)


def test_overlapping_segments_keep_the_higher_value_and_say_so(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    small = np.zeros(ct.shape, np.uint8)
    small[2, 3:5, 2:4] = 1
    label = read_label(ct.seg(tmp_path / "seg.dcm", {"whole": ct.mask(), "core": small}), image)
    assert (label.array == 2).sum() == small.sum()
    assert (label.array == 1).sum() == ct.mask().sum() - small.sum()
    assert "4 voxels belong to several regions" in label.notes[0]


def test_fractional_segment_starts_at_a_half(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    probability = ct.mask() * 0.8
    probability[2] *= 0.5
    label = read_label(ct.seg(tmp_path / "seg.dcm", {"lesion": probability}, fractional=True), image)
    expected = ct.mask()
    expected[2] = 0
    assert np.array_equal(label.array[0], expected)


def test_segments_are_matched_by_name(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    path = ct.seg(tmp_path / "seg.dcm", {"other": ct.mask(), "Lesion": np.roll(ct.mask(), 1, axis=0)})
    label = read_label(path, image, {3: "lesion"})
    assert set(np.unique(label.array)) == {0, 3}
    assert np.array_equal(label.array[0] == 3, np.roll(ct.mask(), 1, axis=0) == 1)
    assert label.notes == ("regions without a label value were left out: other",)


def test_a_label_of_another_region_is_refused(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    with pytest.raises(LabelError, match=r"regions \['Lesion'\]; expected one of \['liver'\]"):
        read_label(ct.rtstruct(tmp_path / "rt.dcm"), image, {5: "liver"})


def test_a_label_drawn_elsewhere_is_refused(tmp_path, dicom):
    ct = dicom()
    image = read_volume(ct.save(tmp_path / "series"))
    shift = np.eye(4)
    shift[:3, 3] = 300.4
    moved = Volume(image.array, shift @ image.affine)
    with pytest.raises(GeometryError, match="outside the image"):
        read_label(ct.rtstruct(tmp_path / "rt.dcm"), moved)
    with pytest.raises(GeometryError, match="does not lie on the grid"):
        read_label(ct.seg(tmp_path / "seg.dcm"), moved)


def test_an_image_is_no_label(tmp_path, dicom):
    ct = dicom()
    folder = ct.save(tmp_path / "series")
    with pytest.raises(LabelError, match="DICOM CT"):
        read_label(next(folder.iterdir()), read_volume(folder))


def test_names_of_segments_over_files(tmp_path, dicom):
    ct = dicom()
    a = ct.seg(tmp_path / "a.dcm", {"liver": ct.mask(), "tumour": ct.mask()})
    b = ct.seg(tmp_path / "b.dcm", {"tumour": ct.mask()})
    assert name_segments([a]) == {1: "liver", 2: "tumour"}
    assert name_segments([a, b]) == {1: "liver", 2: "tumour"}
    assert name_segments([b]) == {1: "tumour"}
