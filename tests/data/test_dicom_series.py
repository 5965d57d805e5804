from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.errors import GeometryError, LayoutError

PYDICOM_FILES = Path(pydicom.data.__file__).parent / "test_files"


def test_slices_are_ordered_by_geometry_and_rescaled(tmp_path, dicom):
    ct = dicom()
    volume = read_volume(ct.save(tmp_path / "series"))
    assert np.array_equal(volume.array[0], ct.stored * 2.0 - 1000)
    assert np.allclose(volume.affine, ct.affine_ras)


def test_reversed_acquisition_gives_the_same_points_in_space(tmp_path, dicom):
    ct = dicom()
    for i, slice_ in enumerate(ct.slices):
        slice_.InstanceNumber = len(ct.slices) - i
    volume = read_volume(ct.save(tmp_path / "series"))
    assert np.array_equal(volume.array[0], ct.stored * 2.0 - 1000)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_compressed_series_equals_the_plain_one(tmp_path, dicom, syntax):
    ct = dicom()
    for slice_ in ct.slices:
        slice_.compress(syntax, generate_instance_uid=False)
    assert np.array_equal(read_volume(ct.save(tmp_path / "series")).array[0], ct.stored * 2.0 - 1000)


@pytest.mark.parametrize("name", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"])
def test_transfer_syntaxes_of_one_mr_slice_agree(name):
    plain = read_volume(PYDICOM_FILES / "MR_small.dcm")
    assert np.array_equal(read_volume(PYDICOM_FILES / f"MR_small_{name}.dcm").array, plain.array)


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm", "SC_rgb_dcmtk_+eb+cr.dcm", "examples_palette.dcm"]
)
def test_colour_pictures_have_three_channels(name):
    volume = read_volume(PYDICOM_FILES / name)
    assert volume.array.shape[0] == 3
    assert len(volume.spatial_shape) == 2


def test_monochrome1_is_turned_so_that_bright_is_high(tmp_path, dicom):
    ct = dicom()
    plain = read_volume(ct.save(tmp_path / "plain")).array
    for slice_ in ct.slices:
        slice_.PhotometricInterpretation = "MONOCHROME1"
    turned = read_volume(ct.save(tmp_path / "turned")).array
    assert np.corrcoef(plain[0, 2].ravel(), turned[0, 2].ravel())[0, 1] == pytest.approx(-1)


def test_multi_frame_object_lies_where_its_series_lies(tmp_path, dicom):
    from highdicom.legacy import LegacyConvertedEnhancedCTImage
    from pydicom.uid import generate_uid

    ct = dicom()
    series = read_volume(ct.save(tmp_path / "series"))
    enhanced = LegacyConvertedEnhancedCTImage(ct.slices, generate_uid(), 3, generate_uid(), 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    volume = read_volume(tmp_path / "enhanced.dcm")
    box = np.argwhere(volume.array[0] > 500)
    centre = volume.affine @ [*box.mean(axis=0), 1]
    expected = series.affine @ [*np.argwhere(series.array[0] > 500).mean(axis=0), 1]
    assert np.allclose(centre, expected, atol=1e-3)
    assert sorted(volume.array.ravel()) == sorted(series.array.ravel())


def test_second_copies_are_left_out_and_said(tmp_path, dicom):
    ct = dicom()
    folder = ct.save(tmp_path / "series")
    ct.slices[2].save_as(folder / "copy.dcm")
    volume = read_volume(folder)
    assert volume.spatial_shape == ct.shape
    assert volume.notes == ("1 second copies of slices were left out",)


def test_files_without_uids_are_one_series_and_that_is_said(tmp_path, dicom):
    ct = dicom()
    for slice_ in ct.slices:
        slice_.SeriesInstanceUID = slice_.SOPInstanceUID = ""
    folder = tmp_path / "series"
    folder.mkdir()
    for i, slice_ in enumerate(ct.slices):
        slice_.save_as(folder / f"{i}.dcm", enforce_file_format=False)
    volume = read_volume(folder)
    assert volume.spatial_shape == ct.shape
    assert len(volume.notes) == 2


def test_one_of_two_series_is_read_when_named(tmp_path, dicom):
    first, second = dicom(), dicom()
    first.save(tmp_path / "both")
    for i, slice_ in enumerate(second.slices):
        slice_.save_as(tmp_path / "both" / f"other{i}.dcm")
    with pytest.raises(LayoutError, match="2 image series"):
        read_volume(tmp_path / "both")
    assert read_volume(tmp_path / "both", first.uids["series"]).spatial_shape == first.shape


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop(2), "missing or uneven"),
        (lambda s: setattr(s[1], "ImagePositionPatient", s[2].ImagePositionPatient), "lie at one place"),
        (lambda s: setattr(s[1], "ImageOrientationPatient", [1, 0, 0, 0, 0, 1]), "different orientations"),
        (lambda s: setattr(s[1], "PixelSpacing", [9, 9]), "different pixel spacings"),
        (lambda s: delattr(s[1], "ImagePositionPatient"), "lacks ImagePositionPatient"),
        (lambda s: setattr(s[1], "SOPInstanceUID", s[2].SOPInstanceUID), "share one SOP instance UID"),
    ],
)
def test_a_series_that_is_no_volume_is_refused(tmp_path, dicom, spoil, message):
    ct = dicom()
    spoil(ct.slices)
    folder = tmp_path / "series"
    folder.mkdir()
    for i, slice_ in enumerate(ct.slices):
        slice_.save_as(folder / f"{i}.dcm", enforce_file_format=False)
    with pytest.raises(GeometryError, match=message):
        read_volume(folder)


def test_ill_formed_values_are_not_quoted_in_warnings(tmp_path, dicom):
    """Warnings are errors here, so a warning would end the test."""
    ct = dicom()
    for slice_ in ct.slices:
        slice_.add_new("PatientBirthDate", "DA", "20200101")
    folder = ct.save(tmp_path / "series")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"20200101", b"SECRET!!"))
    from medfl_ray.data.formats.dicom_files import open_dicom

    assert read_volume(folder).spatial_shape == ct.shape
    assert open_dicom(next(folder.iterdir())).PatientBirthDate == "SECRET!!"


def test_a_film_is_no_volume():
    with pytest.raises(GeometryError, match="30 frames"):
        read_volume(PYDICOM_FILES / "examples_ybr_color.dcm")
