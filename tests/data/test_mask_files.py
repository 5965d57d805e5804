"""Masks as files lie exactly over their image, read back by readers that are not ours and by arithmetic."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medfl_ray.data.formats.contours import fill_regions
from medfl_ray.data.formats.label_codes import SYNONYMS, code_of
from medfl_ray.data.results.mask_files import MASK_FORMATS, MaskOrigin, write_mask
from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.data.uploads.read import opened_upload
from medfl_ray.data.volume import LPS_TO_RAS
from medfl_ray.errors import DataError, GeometryError

LIMITS = UploadLimits()
LABELS = {0: "background", 1: "liver", 3: "left kidney", 4: "something new"}
TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"
PICTURE = TEST_FILES / "JPGExtended.dcm"


def blobs(shape, seed=0):
    """Label values of LABELS in lumps that touch the border, with holes and single voxels among them."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=shape), 1.2)
    mask = np.zeros(shape, np.uint8)
    mask[smooth > np.quantile(smooth, 0.6)] = 1
    mask[smooth > np.quantile(smooth, 0.9)] = 3
    mask[rng.random(shape) > 0.98] = 4
    return mask


@pytest.fixture
def series(tmp_path, dicom):
    """An oblique CT series as an upload, and its builder."""
    builder = dicom()
    with opened_upload(builder.save(tmp_path / "series"), LIMITS) as upload:
        yield upload, builder


def frames_by_arithmetic(seg, affine_ras, shape):
    """Lay a SEG's frames on a grid with the standard's own formula; no library but pydicom's pixels."""
    masks = {}
    shared = seg.SharedFunctionalGroupsSequence[0]
    frames = np.atleast_3d(seg.pixel_array)
    if frames.ndim == 3 and int(seg.NumberOfFrames) == 1:
        frames = seg.pixel_array[None]
    to_voxels = np.linalg.inv(affine_ras) @ LPS_TO_RAS
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        orientation = (
            (shared if "PlaneOrientationSequence" in shared else group)
            .PlaneOrientationSequence[0]
            .ImageOrientationPatient
        )
        spacing = (shared if "PixelMeasuresSequence" in shared else group).PixelMeasuresSequence[0].PixelSpacing
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        target = masks.setdefault(number, np.zeros(shape, bool))
        along_columns, along_rows = np.array(orientation[:3], float), np.array(orientation[3:], float)
        for row, column in zip(*np.nonzero(frame), strict=True):
            point = position + along_rows * spacing[0] * row + along_columns * spacing[1] * column
            index = (to_voxels @ [*point, 1])[:3]
            assert np.abs(index - np.rint(index)).max() < 0.02
            target[tuple(np.rint(index).astype(int))] = True
    return masks


def assert_same_segments(masks, mask):
    for number, value in enumerate((1, 3, 4), start=1):
        expected = mask == value
        found = masks.get(number, np.zeros(mask.shape, bool))
        assert np.array_equal(found, expected), number


def test_dicom_seg_lies_on_an_oblique_series(series):
    import highdicom

    upload, builder = series
    mask = blobs(upload.volume.spatial_shape)
    raw = write_mask(mask, upload, LABELS, "dicom-seg", MaskOrigin("brats", "7"))
    seg = pydicom.dcmread(io.BytesIO(raw))
    assert_same_segments(frames_by_arithmetic(seg, builder.affine_ras, mask.shape), mask)
    assert seg.FrameOfReferenceUID == builder.uids["frame"]
    assert seg.StudyInstanceUID == builder.uids["study"]
    assert {str(s.SeriesInstanceUID) for s in seg.ReferencedSeriesSequence} == {builder.uids["series"]}
    read = highdicom.seg.segread(io.BytesIO(raw)).get_volume(segment_numbers=[1, 2, 3], combine_segments=False)
    grid = highdicom.VolumeGeometry(LPS_TO_RAS @ builder.affine_ras, mask.shape, "PATIENT")
    found = read.match_geometry(grid).array
    assert_same_segments({i + 1: found[..., i] > 0 for i in range(3)}, mask)


def test_segments_are_coded_and_named(series):
    upload, _ = series
    seg = pydicom.dcmread(io.BytesIO(write_mask(blobs(upload.volume.spatial_shape), upload, LABELS, "dicom-seg")))
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "left kidney", "something new"]
    liver, kidney, unknown = [s.SegmentedPropertyTypeCodeSequence[0] for s in seg.SegmentSequence]
    assert (liver.CodeValue, liver.CodingSchemeDesignator) == ("10200004", "SCT")
    assert kidney.CodeValue == "64033007"
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert unknown.CodeValue == "85756007"
    assert seg.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"


@pytest.mark.parametrize("format", ["dicom-seg", "rtstruct"])
def test_an_enhanced_multi_frame_image(tmp_path, dicom, format):
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    builder = dicom()
    enhanced = LegacyConvertedEnhancedCTImage(builder.slices, generate_uid(), 5, generate_uid(), 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    with opened_upload(tmp_path / "enhanced.dcm", LIMITS) as upload:
        assert np.array_equal(upload.volume.array[0][::-1], builder.stored * 2.0 - 1000)  # highdicom turns the axis
        mask = blobs(upload.volume.spatial_shape)
        read = pydicom.dcmread(io.BytesIO(write_mask(mask, upload, LABELS, format)))
        if format == "dicom-seg":
            masks = frames_by_arithmetic(read, upload.volume.affine, mask.shape)
        else:
            masks = fill_regions(read, {1: 1, 2: 3, 3: 4}, upload.volume)
    assert_same_segments(masks, mask)


@pytest.mark.parametrize("seed", range(5))
def test_contours_fill_to_the_same_mask_holes_and_single_voxels_included(series, seed):
    upload, builder = series
    mask = blobs(upload.volume.spatial_shape, seed)
    mask[2, 2:9, 2:9] = 1
    mask[2, 3:5, 3:5] = 0
    mask[2, 6:8, 5:8] = 3
    plan = pydicom.dcmread(io.BytesIO(write_mask(mask, upload, LABELS, "rtstruct")))
    assert_same_segments(fill_regions(plan, {1: 1, 2: 3, 3: 4}, upload.volume), mask)
    assert [str(r.ROIName) for r in plan.StructureSetROISequence] == ["liver", "left kidney", "something new"]
    first = plan.ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0]
    assert str(first.ReferencedSOPInstanceUID) in {str(s.SOPInstanceUID) for s in builder.slices}


def test_each_contour_names_the_slice_it_lies_in(series):
    upload, builder = series
    plan = pydicom.dcmread(io.BytesIO(write_mask(blobs(upload.volume.spatial_shape), upload, LABELS, "rtstruct")))
    by_uid = {str(s.SOPInstanceUID): s for s in builder.slices}
    for region in plan.ROIContourSequence:
        for contour in region.ContourSequence:
            image = by_uid[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
            orientation = np.array(image.ImageOrientationPatient, float)
            normal = np.cross(orientation[:3], orientation[3:])
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            away = (points - np.array(image.ImagePositionPatient, float)) @ normal
            assert np.abs(away).max() < 0.01


SHEARED = np.array([[1.1, 0.2, 0, -3], [0, -0.9, 0.1, 7], [0.1, 0, 2.5, 11], [0, 0, 0, 1.0]])
ROTATED = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, -3, 90], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-2.0, 3, 1.5, 1]), ROTATED, SHEARED])
def test_nifti_and_nrrd_keep_the_affine(tmp_path, write_nifti, affine):
    image = np.random.default_rng(0).normal(size=(5, 7, 9)).astype(np.float32)
    with opened_upload(write_nifti(tmp_path / "image.nii.gz", image, affine), LIMITS) as upload:
        mask = blobs((5, 7, 9))
        written = nib.Nifti1Image.from_bytes(gzip.decompress(write_mask(mask, upload, LABELS, "nifti")))
        assert np.array_equal(np.asarray(written.dataobj), mask)
        assert np.allclose(written.affine, affine, atol=1e-5)
        qform, code = written.get_qform(coded=True)
        assert code == 0 or np.allclose(qform, affine, atol=1e-3)
        (tmp_path / "mask.nrrd").write_bytes(write_mask(mask, upload, LABELS, "nrrd"))
    voxels, header = nrrd.read(str(tmp_path / "mask.nrrd"))
    assert np.array_equal(voxels, mask)
    assert np.allclose(header["space directions"].T, (LPS_TO_RAS @ affine)[:3, :3])
    assert np.allclose(header["space origin"], (LPS_TO_RAS @ affine)[:3, 3])
    assert header["Segment1_Name"] == "left kidney"
    assert header["Segment1_LabelValue"] == "3"


def test_nifti_of_a_dicom_series_lies_in_the_patient(series):
    upload, builder = series
    mask = blobs(upload.volume.spatial_shape)
    written = nib.Nifti1Image.from_bytes(gzip.decompress(write_mask(mask, upload, LABELS, "nifti")))
    assert np.allclose(written.affine, builder.affine_ras, atol=1e-5)
    assert np.array_equal(np.asarray(written.dataobj), mask)


@pytest.mark.parametrize("format", ["dicom-seg", "rtstruct"])
def test_dicom_objects_are_refused_for_other_images(tmp_path, write_nifti, format):
    path = write_nifti(tmp_path / "image.nii", np.zeros((3, 3, 3), np.float32))
    with opened_upload(path, LIMITS) as upload, pytest.raises(DataError, match="send the DICOM series"):
        write_mask(np.zeros((3, 3, 3), np.uint8), upload, LABELS, format)


@pytest.mark.parametrize("format", MASK_FORMATS)
def test_an_empty_mask_and_a_wrong_shape(series, format):
    upload, _ = series
    assert write_mask(np.zeros(upload.volume.spatial_shape, np.uint8), upload, LABELS, format)
    with pytest.raises(GeometryError, match="must be equal"):
        write_mask(np.zeros((2, 2, 2), np.uint8), upload, LABELS, format)


def test_a_single_picture_has_a_seg_and_no_contours():
    with opened_upload(PICTURE, LIMITS) as u:
        mask = np.zeros(u.volume.spatial_shape, np.uint8)
        mask[3:9, 4:8] = 1
        seg = pydicom.dcmread(io.BytesIO(write_mask(mask, u, {1: "nodule"}, "dicom-seg")))
        assert np.array_equal(np.squeeze(seg.pixel_array), mask)
        with pytest.raises(DataError, match="frame of reference"):
            write_mask(mask, u, {1: "nodule"}, "rtstruct")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Tumour", "108369006"), ("glioma", "108369006"), ("hippocampus_anterior", "5366008"), ("LIVER", "10200004"),
        ("Posterior hippocampus", "5366008"), ("kidney_right", "64033007"), ("kidneys", "64033007"),
        ("peritumoral-edema", "79654002"), ("Third ventricle", "49841001"), ("quux", "85756007"), ("", "85756007"),
    ],
)  # fmt: skip
def test_names_have_codes(name, value):
    assert code_of(name).kind.value == value


def test_sides_become_modifiers():
    assert [m.value for m in code_of("hippocampus anterior").modifiers] == [codes.SCT.Anterior.value]
    assert [m.value for m in code_of("Left Kidney").modifiers] == [codes.SCT.Left.value]


@pytest.mark.parametrize("name", sorted(SYNONYMS))
def test_every_synonym_is_in_pydicoms_dictionary(name):
    code = code_of(name)
    assert code.kind.scheme_designator == code.category.scheme_designator == "SCT"
    assert not code.is_generic
