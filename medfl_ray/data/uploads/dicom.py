"""DICOM files from somebody else: every header is checked before one voxel is decoded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medfl_ray.data.formats.dicom_files import NOT_IMAGES, open_dicom
from medfl_ray.data.formats.dicom_series import PIXELS, read_series
from medfl_ray.data.uploads.limits import CHUNK_BYTES, RATIO_COUNTS_FROM, Grant, UploadLimits, check_ratio, check_shape
from medfl_ray.data.volume import Volume, same_grid
from medfl_ray.errors import DataError, GeometryError, LayoutError, UnreadableFile

DEFER_BYTES = 64 * 1024
BYTES_PER_VOXEL = 24  # as stored, decoded, in the modality's unit, stacked
BITS = (1, 8, 16, 32, 64)
# Sizes that lie beyond the largest element of their kind can still be written into a damaged header.
DAMAGE = (EOFError, ValueError, KeyError, NotImplementedError, AttributeError, TypeError, OverflowError, IndexError)


def read_dicom_upload(
    files: Sequence[Path], series: Sequence[str], limits: UploadLimits, grant: Grant
) -> tuple[Volume, tuple[Path, ...]]:
    """Read one image series, or several on one grid as channels.

    Args:
      files: DICOM files in any order, of any number of series.
      series: SeriesInstanceUIDs to read, one per channel; empty where the files hold one series.

    Returns the volume and the files of the first series in the order of its slices.

    Raises:
      UnreadableFile: a header is damaged or claims too much.
      LayoutError: several series and none is named, or a named one is missing.
      GeometryError: the slices do not form a volume, or the channels do not share a grid.
    """
    by_series: dict[str, list[Path]] = {}
    voxels: dict[str, int] = {}
    others: dict[str, int] = {}
    header_bytes = 0
    for place, file in enumerate(files):
        header, length = _checked_header(file, place + 1, limits)
        header_bytes += length
        if header_bytes > limits.memory_bytes // 2:
            raise UnreadableFile(
                f"the DICOM headers take more than {limits.memory_bytes // 2} bytes; the files are damaged"
            )
        modality = str(header.get("Modality", ""))
        if modality in NOT_IMAGES and modality != "RTDOSE":
            others[modality] = others.get(modality, 0) + 1
            continue
        uid = str(header.get("SeriesInstanceUID", ""))
        by_series.setdefault(uid, []).append(file)
        voxels[uid] = voxels.get(uid, 0) + _num_voxels(header, file, place + 1, limits)
    chosen = _choose(by_series, others, series)
    asked = sum(voxels[uid] for uid in chosen)
    if asked > limits.max_voxels:
        raise UnreadableFile(f"the series claims {asked} voxels; at most {limits.max_voxels} are read")
    grant(asked * BYTES_PER_VOXEL)
    return _read(by_series, chosen)


def _read(by_series: dict[str, list[Path]], chosen: Sequence[str]) -> tuple[Volume, tuple[Path, ...]]:
    volume, ordered = read_series(by_series[chosen[0]])
    if len(chosen) == 1:
        return volume, ordered
    channels = [volume.array]
    for uid in chosen[1:]:
        other, _ = read_series(by_series[uid])
        if not same_grid(volume, other):
            raise GeometryError("the named series do not share one grid; resample them before they become channels")
        channels.append(other.array)
    return Volume(np.concatenate(channels), volume.affine, volume.notes), ordered


def _choose(by_series: dict[str, list[Path]], others: dict[str, int], series: Sequence[str]) -> list[str]:
    if not by_series:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "no DICOM file"
        raise LayoutError(f"the upload holds no image series ({kinds}); send the images")
    counts = ", ".join(str(len(files)) for files in by_series.values())
    missing = [uid for uid in series if uid not in by_series]
    if missing:
        raise LayoutError(
            f"{len(missing)} of the {len(series)} named series are not in the upload, which holds {len(by_series)} "
            f"with {counts} files; name a SeriesInstanceUID that is there"
        )
    if series:
        return list(series)
    if len(by_series) > 1:
        raise LayoutError(
            f"the upload holds {len(by_series)} image series with {counts} files; send one, or name it by its "
            "SeriesInstanceUID (series=UID in a request, --series UID for a command)"
        )
    return list(by_series)


def _checked_header(file: Path, number: int, limits: UploadLimits) -> tuple[FileDataset, int]:
    """Parse a file up to its pixels and return the header with its length in bytes; large elements stay on disk."""
    try:
        with file.open("rb") as stream:
            if stream.read(132)[128:] != b"DICM":
                raise InvalidDicomError
            stream.seek(0)
            meta = read_file_meta_info(file)
            deflated = meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
            if deflated:
                _check_deflated(file, limits)
            header = dcmread(stream, stop_before_pixels=True, defer_size=DEFER_BYTES)
            length = stream.tell()
    except (InvalidDicomError, *DAMAGE, RecursionError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise UnreadableFile(
            f"DICOM file {number} is damaged ({type(error).__name__}); export it again from its archive"
        ) from None
    if not deflated and length > limits.max_header_bytes:
        raise UnreadableFile(
            f"DICOM file {number} has {length} bytes before its pixels; at most {limits.max_header_bytes} are read"
        )
    if not header.get("SOPClassUID") and "Modality" not in header:
        raise UnreadableFile(f"DICOM file {number} says neither what object it is nor its modality; export it again")
    return header, length


def _check_deflated(file: Path, limits: UploadLimits) -> None:
    """Inflate in chunks and count, because pydicom inflates as a whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(132)
        head = stream.read(12)
        stream.seek(132 + 12 + int.from_bytes(head[8:12], "little"))
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        total, pending = 0, b""
        while data := pending or stream.read(CHUNK_BYTES):
            total += len(inflate.decompress(data, CHUNK_BYTES))
            pending = inflate.unconsumed_tail
            check_ratio(total, size, limits)
            if total > limits.memory_bytes // 4:
                raise UnreadableFile("the deflated DICOM file is too large; export it in another transfer syntax")
            if inflate.eof:
                break


def _num_voxels(header: FileDataset, file: Path, number: int, limits: UploadLimits) -> int:
    """Return how many voxels an image's header claims, checked against the file's length."""
    try:
        shape = tuple(int(header.get(key) or 0) for key in ("Rows", "Columns"))
        frames = int(header.get("NumberOfFrames") or 1)
        samples, bits = int(header.get("SamplesPerPixel") or 1), int(header.get("BitsAllocated") or 0)
        syntax = header.file_meta.TransferSyntaxUID
        packed = bool(syntax.is_encapsulated or syntax.is_deflated)
    except DAMAGE as error:
        raise UnreadableFile(
            f"DICOM file {number} has a damaged size or transfer syntax ({type(error).__name__}); export it again"
        ) from None
    if samples not in (1, 3, 4) or bits not in BITS:
        raise UnreadableFile(f"DICOM file {number} has {samples} samples of {bits} bits per pixel; it is damaged")
    if frames < 1 or frames > limits.max_voxels:
        raise UnreadableFile(f"DICOM file {number} claims {frames} frames; it is damaged")
    if min(shape) < 1:
        raise UnreadableFile(f"DICOM file {number} has no rows or columns; it has no pixels, or is damaged")
    pixels = check_shape(shape, limits)
    voxels = pixels * frames * samples
    if pixels > limits.max_frame_pixels or voxels > limits.max_voxels:
        raise UnreadableFile(
            f"DICOM file {number} claims {voxels} voxels; at most {limits.max_voxels} are read, and "
            f"{limits.max_frame_pixels} in a frame"
        )
    needed = voxels * bits // 8
    if str(header.get("PhotometricInterpretation", "")) == "YBR_FULL_422":
        needed = needed * 2 // 3
    size = file.stat().st_size
    if packed and voxels * 4 > RATIO_COUNTS_FROM and needed > limits.max_ratio * size:
        raise UnreadableFile(
            f"DICOM file {number} decodes to more than {limits.max_ratio} times its size; images do not"
        )
    if not packed and size < needed:
        raise UnreadableFile(
            f"DICOM file {number} is truncated: its pixels need {needed} bytes and the whole file has {size}"
        )
    return voxels


def headers_of(files: Sequence[Path]) -> tuple[FileDataset, ...]:
    """Headers of files that have been read before, without pixels; what results refer to."""
    return tuple(_without_pixels(open_dicom(file, pixels=False)) for file in files)


def _without_pixels(header: FileDataset) -> FileDataset:
    for key in PIXELS:
        if key in header:
            delattr(header, key)
    return header
