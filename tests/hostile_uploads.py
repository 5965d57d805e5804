"""Uploads that want to harm: each is a function from a folder to the bytes that are sent."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from dicom_builder import DicomBuilder
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

Hostile = Callable[[Path], bytes]
HOSTILE: dict[str, Hostile] = {}


def hostile(function: Hostile) -> Hostile:
    """List a function under its name."""
    HOSTILE[function.__name__] = function
    return function


def _nifti(**fields: Any) -> bytes:
    """A small NIfTI file whose header fields are overwritten."""
    raw = bytearray(nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.eye(4)).to_bytes())
    header = np.frombuffer(raw, dtype=nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    return bytes(raw)


def _nifti2(**fields: Any) -> bytes:
    raw = bytearray(nib.Nifti2Image(np.ones((4, 5, 6), np.float32), np.eye(4)).to_bytes())
    header = np.frombuffer(raw, dtype=nib.Nifti2Header.template_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    return bytes(raw)


NIFTI_FIELDS: dict[str, bytes] = {
    "nifti_absurd_dimensions": _nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
    "nifti_seven_long_axes": _nifti(dim=[7, 32767, 32767, 32767, 32767, 32767, 32767, 32767]),
    "nifti_negative_size": _nifti(dim=[3, 4, -5, 6, 1, 1, 1, 1]),
    "nifti_zero_size": _nifti(dim=[3, 4, 0, 6, 1, 1, 1, 1]),
    "nifti_no_axes": _nifti(dim=[0, 4, 5, 6, 1, 1, 1, 1]),
    "nifti_ninety_axes": _nifti(dim=[90, 4, 5, 6, 1, 1, 1, 1]),
    "nifti_more_voxels_than_bytes": _nifti(dim=[3, 400, 500, 600, 1, 1, 1, 1]),
    "nifti_unknown_type": _nifti(datatype=9999),
    "nifti_complex_type": _nifti(datatype=1792),
    "nifti_colour_type": _nifti(datatype=128),
    "nifti_float128_type": _nifti(datatype=1536),
    "nifti_nan_offset": _nifti(vox_offset=np.nan),
    "nifti_negative_offset": _nifti(vox_offset=-1e9),
    "nifti_far_offset": _nifti(vox_offset=3e9),
    "nifti_offset_in_header": _nifti(vox_offset=4),
    "nifti_nan_affine": _nifti(sform_code=1, srow_x=[np.nan] * 4),
    "nifti_infinite_affine": _nifti(sform_code=1, srow_y=[np.inf] * 4),
    "nifti_singular_affine": _nifti(sform_code=1, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4),
    "nifti_zero_spacing": _nifti(sform_code=0, qform_code=0, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]),
    "nifti_bad_quaternion": _nifti(sform_code=0, qform_code=1, quatern_b=7, quatern_c=7, quatern_d=7),
    "nifti_nan_scale": _nifti(scl_slope=1e38, scl_inter=3e38),
    "nifti_pair_without_image": _nifti(magic=b"ni1\0"),
    "nifti_no_magic": _nifti(magic=b"zzz\0"),
    "nifti2_huge_axis": _nifti2(dim=[3, 2**62, 2**62, 2**62, 1, 1, 1, 1]),
    "nifti2_negative_axis": _nifti2(dim=[3, -(2**62), 5, 6, 1, 1, 1, 1]),
    "nifti2_far_offset": _nifti2(vox_offset=2**62),
    "nifti_truncated_header": _nifti()[:200],
    "nifti_truncated_voxels": _nifti()[:-50],
    "nifti_nan_voxels": nib.Nifti1Image(np.full((4, 5, 6), np.nan, np.float32), np.eye(4)).to_bytes(),
}
for _name, _raw in NIFTI_FIELDS.items():
    HOSTILE[_name] = lambda folder, raw=_raw: raw


@hostile
def gzip_truncated(folder: Path) -> bytes:
    return gzip.compress(_nifti())[:-40]


@hostile
def gzip_damaged(folder: Path) -> bytes:
    raw = bytearray(gzip.compress(_nifti()))
    raw[-6] ^= 0xFF
    return bytes(raw)


@hostile
def gzip_of_nonsense(folder: Path) -> bytes:
    return gzip.compress(b"no image " * 1000)


@hostile
def gzip_in_gzip(folder: Path) -> bytes:
    return gzip.compress(gzip.compress(_nifti()))


@hostile
def gzip_bomb_of_zeros(folder: Path) -> bytes:
    """1.9 GB of an honest NIfTI header's zeros in 2 MB."""
    return _bomb(_nifti(dim=[3, 800, 800, 740, 1, 1, 1, 1]), 800 * 800 * 740 * 4)


@hostile
def gzip_bomb_behind_a_small_header(folder: Path) -> bytes:
    return _bomb(_nifti(), 1024**3)


def _zeros(num_bytes: int) -> bytes:
    """A deflate stream of zeros without its end: one block after a full flush, as often as it takes."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = pack.compress(bytes(4 * 1024**2)) + pack.flush(zlib.Z_FULL_FLUSH)
    return block * (num_bytes // (4 * 1024**2))


def _bomb(start: bytes, num_zeros: int) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    return pack.compress(start) + pack.flush(zlib.Z_FULL_FLUSH) + _zeros(num_zeros) + pack.flush()


def _nrrd_text(extra: str = "", sizes: str = "4 5 6", kind: str = "float", encoding: str = "raw") -> bytes:
    return (
        f"NRRD0004\ntype: {kind}\ndimension: 3\nsizes: {sizes}\nencoding: {encoding}\nendian: little\n"
        f"space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n{extra}\n"
    ).encode()


VOXELS = np.ones(120, "<f4").tobytes()
NRRD_FILES: dict[str, bytes] = {
    "nrrd_reads_another_file": _nrrd_text("data file: /etc/passwd\n") + VOXELS,
    "nrrd_reads_many_files": _nrrd_text("data file: LIST\n/etc/passwd\n") + VOXELS,
    "nrrd_absurd_sizes": _nrrd_text(sizes="99999 99999 99999") + VOXELS,
    "nrrd_negative_size": _nrrd_text(sizes="4 -5 6") + VOXELS,
    "nrrd_sizes_of_words": _nrrd_text(sizes="four five six") + VOXELS,
    "nrrd_sizes_missing": _nrrd_text(sizes="4 5") + VOXELS,
    "nrrd_block_type": _nrrd_text(kind="block") + VOXELS,
    "nrrd_unknown_type": _nrrd_text(kind="pickle") + VOXELS,
    "nrrd_unknown_encoding": _nrrd_text(encoding="exe") + VOXELS,
    "nrrd_skips_bytes": _nrrd_text("byte skip: 99999999999\n") + VOXELS,
    "nrrd_truncated": _nrrd_text() + VOXELS[:-1],
    "nrrd_damaged_gzip": _nrrd_text(encoding="gzip") + VOXELS,
    "nrrd_endless_header": b"NRRD0004\n" + b"# nothing\n" * 100_000,
    "nrrd_header_without_lines": b"NRRD0004" + b"x" * 1_000_000,
    "nrrd_gzip_bomb": _nrrd_text(encoding="gzip") + _bomb(b"", 512 * 1024**2),
    "nrrd_nan_directions": _nrrd_text().replace(b"(1,0,0)", b"(nan,0,0)") + VOXELS,
}
for _name, _raw in NRRD_FILES.items():
    HOSTILE[_name] = lambda folder, raw=_raw: raw


def _dicom(folder: Path, change: Callable[[pydicom.FileDataset], None]) -> bytes:
    """One DICOM file of a CT after a change."""
    image = DicomBuilder().slices[0]
    change(image)
    path = folder / "changed.dcm"
    image.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def _raw_field(folder: Path, tag: bytes, value: bytes) -> bytes:
    """One DICOM file in which the two bytes of a US element are overwritten."""
    raw = bytearray(_dicom(folder, lambda image: None))
    place = raw.index(tag + b"US") + 8
    raw[place : place + 2] = value
    return bytes(raw)


@hostile
def dicom_absurd_rows_and_columns(folder: Path) -> bytes:
    def change(image: pydicom.FileDataset) -> None:
        image.Rows = image.Columns = 65535

    return _dicom(folder, change)


@hostile
def dicom_no_rows(folder: Path) -> bytes:
    return _raw_field(folder, b"\x28\x00\x10\x00", b"\0\0")


@hostile
def dicom_more_rows_than_bytes(folder: Path) -> bytes:
    return _raw_field(folder, b"\x28\x00\x10\x00", b"\xff\x0f")


@hostile
def dicom_odd_bits(folder: Path) -> bytes:
    return _raw_field(folder, b"\x28\x00\x00\x01", b"\x17\x17")


@hostile
def dicom_many_samples(folder: Path) -> bytes:
    return _raw_field(folder, b"\x28\x00\x02\x00", b"\xff\xff")


def _frames(value: bytes) -> Hostile:
    def build(folder: Path) -> bytes:
        def change(image: pydicom.FileDataset) -> None:
            image.NumberOfFrames = "1234567890"

        return _dicom(folder, change).replace(b"1234567890", value)

    return build


HOSTILE["dicom_two_thousand_million_frames"] = _frames(b"2147483647")
HOSTILE["dicom_negative_frames"] = _frames(b"-999999999")
HOSTILE["dicom_frames_of_words"] = _frames(b"many times")


@hostile
def dicom_truncated(folder: Path) -> bytes:
    return _dicom(folder, lambda image: None)[:-100]


@hostile
def dicom_truncated_header(folder: Path) -> bytes:
    return _dicom(folder, lambda image: None)[:300]


@hostile
def dicom_only_the_mark(folder: Path) -> bytes:
    return b"\0" * 128 + b"DICM"


@hostile
def dicom_noise_after_the_mark(folder: Path) -> bytes:
    return b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(100_000)


@hostile
def dicom_element_of_four_gigabytes(folder: Path) -> bytes:
    raw = _dicom(folder, lambda image: None)
    place = raw.index(b"\xe0\x7f\x10\x00OW") + 8
    return raw[:place] + b"\xfe\xff\xff\xff" + raw[place + 4 :]


@hostile
def dicom_long_private_element(folder: Path) -> bytes:
    def change(image: pydicom.FileDataset) -> None:
        image.add_new(0x00090010, "LO", "X")
        image.add_new(0x00091001, "OB", bytes(40 * 1024**2))

    return _dicom(folder, change)


@hostile
def dicom_nested_thousandfold(folder: Path) -> bytes:
    """A sequence within a sequence, 20,000 deep, of undefined length."""
    start = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    raw = _dicom(folder, lambda image: None)
    place = raw.index(b"\x08\x00\x60\x00CS")
    return raw[:place] + start * 20_000


@hostile
def dicom_implicit_marked_explicit(folder: Path) -> bytes:
    raw = _dicom(folder, lambda image: setattr(image.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
    return raw.replace(b"1.2.840.10008.1.2\0", b"1.2.840.10008.9.9\0")


@hostile
def dicom_deflate_bomb(folder: Path) -> bytes:
    meta = _dicom(folder, lambda image: setattr(image.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))
    length = struct.unpack_from("<I", meta, 140)[0]
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = pack.compress(b"\x08\x00\x60\x00CS\x02\x00CT" + b"\x09\x00\x01\x10OB\0\0" + struct.pack("<I", 2**31))
    return meta[: 144 + length] + body + pack.flush(zlib.Z_FULL_FLUSH) + _zeros(1024**3) + pack.flush()


def _compressed(syntax: str, codestream: bytes, edge: int = 64) -> Hostile:
    def build(folder: Path) -> bytes:
        def change(image: pydicom.FileDataset) -> None:
            image.Rows = image.Columns = edge
            image.PixelData = encapsulate([codestream + b"\0" * (len(codestream) % 2)])
            image["PixelData"].is_undefined_length = True
            image.file_meta.TransferSyntaxUID = syntax

        return _dicom(folder, change)

    return build


def _jpeg2000_of(edge: int) -> bytes:
    """A JPEG 2000 main header that claims a picture of an edge; its tile is missing."""
    size = struct.pack(">HIIIIIIIIHBBB", 0, edge, edge, 0, 0, edge, edge, 0, 0, 1, 15, 1, 1)
    cod = b"\xff\x52\x00\x0c\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01"
    qcd = b"\xff\x5c\x00\x13\x40" + bytes([0x48 + 8 * (i % 4) for i in range(16)])
    sot = b"\xff\x90\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x01"
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size + cod + qcd + sot + b"\xff\x93\xff\xd9"


def _jpeg_of(edge: int) -> bytes:
    """A JPEG header that claims a picture of an edge, without its scan."""
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, edge, edge, 1) + b"\x01\x11\x00"
    return b"\xff\xd8" + b"\xff\xdb\x00\x43\x00" + bytes([1] * 64) + frame + b"\xff\xd9"


HOSTILE["jpeg2000_larger_than_its_header"] = _compressed(JPEG2000Lossless, _jpeg2000_of(60_000))
HOSTILE["jpeg2000_of_noise"] = _compressed(JPEG2000Lossless, np.random.default_rng(1).bytes(5000))
HOSTILE["jpeg_larger_than_its_header"] = _compressed(JPEGBaseline8Bit, _jpeg_of(65_500))
HOSTILE["jpeg_of_noise"] = _compressed(JPEGBaseline8Bit, b"\xff\xd8" + np.random.default_rng(2).bytes(5000))
HOSTILE["jpegls_of_noise"] = _compressed(JPEGLSLossless, b"\xff\xd8\xff\xf7" + np.random.default_rng(3).bytes(5000))
HOSTILE["rle_of_noise"] = _compressed(RLELossless, np.random.default_rng(4).bytes(5000))
HOSTILE["rle_shorter_than_its_picture"] = _compressed(
    RLELossless, struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0", 4096
)


@hostile
def dicom_unknown_transfer_syntax(folder: Path) -> bytes:
    raw = _dicom(folder, lambda image: None)
    return raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.7.7.7\0")


@hostile
def dicom_of_a_structured_report(folder: Path) -> bytes:
    return _dicom(folder, lambda image: setattr(image, "Modality", "SR"))


def _zip(
    entries: dict[str, bytes] | list[tuple[zipfile.ZipInfo | str, bytes]], method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    buffer = io.BytesIO()
    pairs = list(entries.items()) if isinstance(entries, dict) else entries
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, raw in pairs:
            archive.writestr(name, raw)
    return buffer.getvalue()


def _one(folder: Path) -> bytes:
    return _dicom(folder, lambda image: None)


for _place, _path in {
    "above": "../../etc/cron.d/evil.dcm", "absolute": "/etc/passwd", "drive": "C:/Windows/evil.dcm",
    "backslash": "..\\..\\evil.dcm",
}.items():  # fmt: skip
    HOSTILE[f"zip_slip_{_place}"] = lambda folder, path=_path: _zip({path: _one(folder)})


@hostile
def zip_with_a_link(folder: Path) -> bytes:
    entry = zipfile.ZipInfo("link.dcm")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return _zip([(entry, b"/etc/passwd"), ("a.dcm", _one(folder))])


@hostile
def zip_with_a_device(folder: Path) -> bytes:
    entry = zipfile.ZipInfo("disk.dcm")
    entry.external_attr = (stat.S_IFBLK | 0o777) << 16
    return _zip([(entry, b"x"), ("a.dcm", _one(folder))])


@hostile
def zip_encrypted(folder: Path) -> bytes:
    raw = bytearray(_zip({"a.dcm": _one(folder)}))
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


@hostile
def zip_bomb(folder: Path) -> bytes:
    return _zip({f"{i}.dcm": bytes(24 * 1024**2) for i in range(4)})


@hostile
def zip_bomb_by_its_directory(folder: Path) -> bytes:
    """A directory that claims 4 GB for each of forty files."""
    raw = bytearray(_zip({f"{i}.dcm": b"x" * 100 for i in range(40)}))
    place = -1
    while (place := raw.find(b"PK\x01\x02", place + 1)) >= 0:
        struct.pack_into("<I", raw, place + 24, 0xFFFFFFFE)
    return bytes(raw)


@hostile
def zip_that_lies_about_its_sizes(folder: Path) -> bytes:
    raw = bytearray(_zip({"a.dcm": b"\0" * 128 + b"DICM" + bytes(8 * 1024**2)}))
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, 500)
    return bytes(raw)


@hostile
def zip_of_overlapping_files(folder: Path) -> bytes:
    """Many directory entries for one file, as in the overlapping bombs."""
    raw = _zip({"a.dcm": _one(folder) * 50}, zipfile.ZIP_STORED)
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    directory = raw[start:end] * 100
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 100, 100, len(directory), start, 0)
    return raw[:start] + directory + tail


@hostile
def zip_in_zip(folder: Path) -> bytes:
    return _zip({"inner.zip": _zip({"a.dcm": _one(folder)})})


@hostile
def zip_in_zip_under_another_name(folder: Path) -> bytes:
    return _zip({"image.dcm": _zip({"a.dcm": _one(folder)})})


@hostile
def zip_of_very_many_files(folder: Path) -> bytes:
    return _zip({str(i): b"" for i in range(25_000)}, zipfile.ZIP_STORED)


@hostile
def zip_nested_too_deeply(folder: Path) -> bytes:
    return _zip({"a/" * 40 + "a.dcm": _one(folder)})


@hostile
def zip_truncated(folder: Path) -> bytes:
    return _zip({"a.dcm": _one(folder)})[:-30]


@hostile
def zip_with_a_damaged_file(folder: Path) -> bytes:
    raw = bytearray(_zip({"a.dcm": _one(folder)}))
    raw[200:220] = b"\xff" * 20
    return bytes(raw)


@hostile
def zip_with_lzma(folder: Path) -> bytes:
    return _zip({"a.dcm": _one(folder)}, zipfile.ZIP_LZMA)


@hostile
def zip_without_dicom(folder: Path) -> bytes:
    return _zip({"run.exe": b"MZ" + bytes(1000), "scan.nii": _nifti()})


@hostile
def zip_of_nothing(folder: Path) -> bytes:
    return _zip({})


@hostile
def zip_of_the_same_slice_in_other_clothes(folder: Path) -> bytes:
    """Two files with one SOP instance UID and different pixels."""
    builder = DicomBuilder()
    first, second = builder.slices[0], builder.slices[1]
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    files = {}
    for name, image in (("a", first), ("b", second)):
        image.save_as(folder / name, enforce_file_format=True)
        files[f"{name}.dcm"] = (folder / name).read_bytes()
    return _zip(files)


@hostile
def series_with_a_huge_gap(folder: Path) -> bytes:
    builder = DicomBuilder()
    builder.slices[-1].ImagePositionPatient = [0, 0, 1e9]
    builder.save(folder / "series")
    return _zip({path.name: path.read_bytes() for path in (folder / "series").iterdir()})


@hostile
def series_with_a_nan_position(folder: Path) -> bytes:
    builder = DicomBuilder()
    builder.save(folder / "series")
    files = {path.name: path.read_bytes() for path in (folder / "series").iterdir()}
    name, raw = next(iter(files.items()))
    place = raw.index(b"\x20\x00\x32\x00DS") + 8
    files[name] = raw[:place] + b"nan" + raw[place + 3 :]
    return _zip(files)


@hostile
def picture_file(folder: Path) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes(5000)


@hostile
def script(folder: Path) -> bytes:
    return b"#!/bin/sh\nrm -rf /\n" * 100


@hostile
def pickle_file(folder: Path) -> bytes:
    return b"\x80\x04\x95" + bytes(1000)


@hostile
def onnx_with_data_elsewhere(folder: Path) -> bytes:
    """A network whose weights lie at another path; no model is taken from a request."""
    import onnx

    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return onnx.ModelProto(graph=onnx.GraphProto(name="g", initializer=[tensor])).SerializeToString()


@hostile
def nothing_at_all(folder: Path) -> bytes:
    return b""
