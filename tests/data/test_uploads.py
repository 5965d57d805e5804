"""Uploads of every kind are read alike, in this process and in a fork; what cannot be read is refused in a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import time
import zipfile
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import psutil
import pydicom.data
import pytest
from hostile_uploads import HOSTILE

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.data.uploads.process import VOXELS, UploadReader
from medfl_ray.data.uploads.read import opened_upload, read_upload
from medfl_ray.errors import DataError, LayoutError, UnreadableFile

# pydicom remarks on the odd files that are the point of these tests.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIMITS = UploadLimits()
TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"
# DICOM files alone; the others there are character sets, palettes, directories of media and plain pictures.
PYDICOM_FILES = sorted(
    path
    for path in TEST_FILES.rglob("*")
    if path.is_file() and path.suffix in ("", ".dcm") and path.name not in ("README.txt", "LICENSE")
)
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0.9, 0.1, -30], [0, -0.1, 2.0, 5], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def reader():
    reader = UploadReader(LIMITS)
    reader.start()
    yield reader
    reader.close()


def read(path, **options):
    with opened_upload(path, LIMITS, **options) as upload:
        return upload


def test_pydicom_brings_its_files():
    syntaxes = set()
    for path in PYDICOM_FILES:
        try:
            syntaxes.add(pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID.name)
        except (pydicom.errors.InvalidDicomError, AttributeError):
            continue
    assert len(syntaxes) >= 12


@pytest.mark.parametrize("path", PYDICOM_FILES, ids=lambda path: path.name)
def test_every_file_of_pydicom_is_read_or_refused_in_a_sentence(path):
    with contextlib.ExitStack() as stack:
        try:
            upload = stack.enter_context(opened_upload(path, LIMITS))
        except DataError as error:
            sentence = str(error)
            upload = None
    if upload is None:
        assert 20 < len(sentence) < 400
        assert str(path) not in sentence
        return
    assert np.isfinite(upload.volume.array).all()
    assert upload.kind == "dicom"
    assert len(upload.files) == 1


# What must be read: one image of each transfer syntax that pydicom brings, compared with the same image uncompressed.
SAME_IMAGES = [
    ("MR_small.dcm", name, 0)
    for name in (
        "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
    )
] + [
    ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", 0),
    ("rtdose_1frame.dcm", "rtdose_rle_1frame.dcm", 0),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "other", "tolerance"), SAME_IMAGES)
def test_transfer_syntaxes_of_one_image_agree(plain, other, tolerance):
    first, second = read(TEST_FILES / plain).volume, read(TEST_FILES / other).volume
    assert np.abs(first.array - second.array).max() <= tolerance
    assert np.allclose(first.affine, second.affine)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_dcmtk.dcm", "JPGExtended.dcm", "SC_jpeg_no_color_transform.dcm", "JPEG2000.dcm",
        "JPEGLSNearLossless_16.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "image_dfl.dcm",
        "examples_jpeg2k.dcm",
    ],
)  # fmt: skip
def test_lossy_and_deflated_images_are_read(name):
    assert read(TEST_FILES / name).volume.array.std() > 0


def test_nifti_and_nrrd_whatever_they_are_called(tmp_path, reader):
    values = np.random.default_rng(0).normal(size=(5, 7, 9)).astype(np.float32)
    raw = nib.Nifti1Image(values, AFFINE).to_bytes()
    (tmp_path / "plain").write_bytes(raw)
    (tmp_path / "packed").write_bytes(gzip.compress(raw))
    (tmp_path / "second").write_bytes(nib.Nifti2Image(values, AFFINE).to_bytes())
    for encoding in ("raw", "gzip"):
        header = {"encoding": encoding, "space": "right-anterior-superior", "space directions": AFFINE[:3, :3].T}
        nrrd.write(str(tmp_path / f"{encoding}.nrrd"), values, header | {"space origin": AFFINE[:3, 3]})
        (tmp_path / f"{encoding}.nrrd").rename(tmp_path / encoding)
    for name in ("plain", "packed", "second", "raw", "gzip"):
        workspace = tmp_path / f"space of {name}"
        workspace.mkdir()
        for upload in (read(tmp_path / name), asyncio.run(reader.read(tmp_path / name, workspace))):
            assert np.array_equal(upload.volume.array[0], values)
            assert np.allclose(upload.volume.affine, AFFINE, atol=1e-6)


def test_channels_come_last_in_nifti_and_first_in_a_volume(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 7, 9, 4)).astype(np.float32)
    (tmp_path / "image.nii").write_bytes(nib.Nifti1Image(values, AFFINE).to_bytes())
    assert np.array_equal(read(tmp_path / "image.nii").volume.array, np.moveaxis(values, 3, 0))


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, str(file.relative_to(folder)))
        archive.writestr("DICOMDIR", b"\0" * 128 + b"DICM")
        archive.writestr("viewer/autorun.inf", b"[autorun]")
    return path


def test_a_zipped_series_a_folder_and_a_fork_agree(tmp_path, dicom, reader):
    builder = dicom()
    folder = builder.save(tmp_path / "series")
    packed = zip_of(folder, tmp_path / "series.zip")
    (tmp_path / "space").mkdir()
    expected = read_volume(folder)
    with opened_upload(packed, LIMITS) as upload:
        assert [h.SOPInstanceUID for h in upload.headers] == [s.SOPInstanceUID for s in builder.slices]
        assert all("PixelData" not in header for header in upload.headers)
        zipped = upload.volume
    forked = asyncio.run(reader.read(packed, tmp_path / "space"))
    assert [h.SOPInstanceUID for h in forked.headers] == [s.SOPInstanceUID for s in builder.slices]
    for volume in (read(folder).volume, zipped, forked.volume):
        assert np.array_equal(volume.array, expected.array)
        assert np.allclose(volume.affine, expected.affine)


def test_named_series_become_channels_where_they_share_a_grid(tmp_path, dicom):
    first, second = dicom(), dicom()
    second.stored[:] = 7
    for slice_ in second.slices:
        slice_.PixelData = np.full(second.shape[1:], 7, "<u2").tobytes()
    first.save(tmp_path / "study" / "a")
    second.save(tmp_path / "study" / "b")
    uids = (second.uids["series"], first.uids["series"])
    with opened_upload(tmp_path / "study", LIMITS, series=uids) as upload:
        assert upload.volume.array.shape == (2, *first.shape)
        assert (upload.volume.array[0] == 7 * 2 - 1000).all()
        assert upload.headers[0].SeriesInstanceUID == uids[0]
    with pytest.raises(LayoutError, match="2 image series with 6, 6 files"):
        read(tmp_path / "study")
    with pytest.raises(LayoutError, match="1 of the 1 named series"):
        read(tmp_path / "study", series=("1.2",))


def test_slices_in_the_wrong_order_and_twice(tmp_path, dicom):
    builder = dicom()
    folder = builder.save(tmp_path / "series")
    builder.slices[2].save_as(folder / "again.dcm", enforce_file_format=True)
    upload = read(folder)
    assert np.array_equal(upload.volume.array[0], builder.stored * 2.0 - 1000)
    assert len(upload.files) == len(builder.slices)
    assert any("second copies" in note for note in upload.volume.notes)


# Their harm is in a decoder or in one long read, which only a fork bounds; tests/serve sends them to a service.
NEED_A_FORK = {name for name in HOSTILE if name.startswith(("jpeg", "rle"))} | {"dicom_element_of_four_gigabytes"}


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - NEED_A_FORK))
def test_hostile_uploads_are_refused_in_this_process_too(tmp_path, name):
    (tmp_path / "space").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "upload").write_bytes(HOSTILE[name](tmp_path / "made"))
    with pytest.raises(DataError) as refused:
        read_upload(tmp_path / "upload", LIMITS, tmp_path / "space")
    assert str(tmp_path) not in str(refused.value)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.parent.name != "made") < 300 * 1024**2


def test_a_reader_that_takes_too_long_is_ended(tmp_path):
    """A limit of a second on what takes longer to unpack; other limits are off."""
    generous = {"max_ratio": 10**6, "bytes_per_second": 10**15, "seconds": 0.5, "max_voxels": 2**40}
    reader = UploadReader(LIMITS.model_copy(update=generous))
    (tmp_path / "space").mkdir()
    (tmp_path / "upload").write_bytes(HOSTILE["gzip_bomb_of_zeros"](tmp_path))
    reader.start()
    started = time.monotonic()
    with pytest.raises(UnreadableFile, match="more time or memory than its size allows"):
        asyncio.run(reader.read(tmp_path / "upload", tmp_path / "space"))
    assert time.monotonic() - started < 5
    reader.close()


def test_a_reading_that_is_cancelled_ends_its_fork_before_it_ends_itself(tmp_path):
    """The fork would wait a minute for somebody to read what it writes; its folder is not removed under it."""
    reader = UploadReader(LIMITS.model_copy(update={"seconds": 60}))
    space = tmp_path / "space"
    space.mkdir()
    os.mkfifo(space / VOXELS)
    (tmp_path / "image.nii").write_bytes(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)).to_bytes())
    reader.start()
    helper = psutil.Process(reader._helper.pid)

    async def work():
        reading = asyncio.create_task(reader.read(tmp_path / "image.nii", space))
        while not (forks := helper.children()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert helper.children() == forks
        reading.cancel()
        await asyncio.wait([reading], timeout=20)
        assert reading.cancelled()
        return forks

    _, alive = psutil.wait_procs(asyncio.run(work()), timeout=10)
    assert not alive
    reader.close()


def test_a_helper_that_was_killed_is_started_again(tmp_path):
    reader = UploadReader(LIMITS)
    (tmp_path / "image.nii").write_bytes(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)).to_bytes())
    for turn in range(2):
        space = tmp_path / f"space {turn}"
        space.mkdir()
        assert asyncio.run(reader.read(tmp_path / "image.nii", space)).volume.spatial_shape == (3, 3, 3)
        assert reader._helper is not None
        reader._helper.kill()
        reader._helper.wait()
    reader.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_upload_bytes": 100}, "at most 100"),
        ({"max_voxels": 10}, "at most 10"),
        ({"max_edge": 4}, "at most 4"),
    ],
)
def test_limits_can_be_set(tmp_path, change, words):
    (tmp_path / "image.nii").write_bytes(nib.Nifti1Image(np.zeros((3, 3, 5), np.float32), np.eye(4)).to_bytes())
    with (
        pytest.raises(UnreadableFile, match=words),
        opened_upload(tmp_path / "image.nii", LIMITS.model_copy(update=change)),
    ):
        pytest.fail("it was read")
