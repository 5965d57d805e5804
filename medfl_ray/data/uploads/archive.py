"""A zip from somebody else: judged by its directory before anything is unpacked, and unpacked under our own names."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from medfl_ray.data.uploads.limits import CHUNK_BYTES, Grant, UploadLimits, check_ratio
from medfl_ray.errors import UnreadableFile

END_OF_DIRECTORY, LONGEST_COMMENT = b"PK\x05\x06", 65_535 + 22
BYTES_PER_ENTRY = 1024
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar")
ARCHIVE_STARTS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
LEFT_OUT = ("dicomdir", ".ds_store", "thumbs.db", "lockfile", "version")


def is_zip(start: bytes) -> bool:
    """Whether a file starts as a zip does."""
    return start[:4] in (b"PK\x03\x04", END_OF_DIRECTORY)


def unpack_dicom(path: Path, folder: Path, limits: UploadLimits, grant: Grant) -> list[Path]:
    """Unpack the DICOM files of a zip into a folder under numbers for names; other files are left where they are.

    Raises:
      UnreadableFile: the zip is damaged, encrypted, too large, nested, or names places outside of itself.
    """
    _check_directory(path, limits)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check_entries(entries, path.stat().st_size, limits)
            wanted = [entry for entry in entries if not _left_out(entry)]
            grant(0)
            return _unpack(archive, wanted, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, struct.error) as error:
        if isinstance(error, UnreadableFile):
            raise
        raise UnreadableFile(f"not a complete zip file ({type(error).__name__}); make it again") from None


def _check_directory(path: Path, limits: UploadLimits) -> None:
    """Bound the zip's list of entries, which Python would read as a whole."""
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - LONGEST_COMMENT))
        tail = stream.read()
    place = tail.rfind(END_OF_DIRECTORY)
    if place < 0 or len(tail) < place + 22:
        raise UnreadableFile("not a complete zip file: its directory is missing; make it again")
    directory_bytes = struct.unpack_from("<I", tail, place + 12)[0]
    many = min(size, directory_bytes) > limits.max_files * BYTES_PER_ENTRY
    if many or struct.unpack_from("<H", tail, place + 10)[0] > limits.max_files:
        raise UnreadableFile(f"the zip lists more than {limits.max_files} files; send one series")


def _check_entries(entries: list[zipfile.ZipInfo], size: int, limits: UploadLimits) -> None:
    if len(entries) > limits.max_files:
        raise UnreadableFile(f"the zip lists more than {limits.max_files} files; send one series")
    for entry in entries:
        _check_entry(entry, limits)
    if sum(entry.compress_size for entry in entries) > size:
        raise UnreadableFile("the files of the zip overlap each other; make it again")
    check_ratio(sum(entry.file_size for entry in entries), size, limits)


def _check_entry(entry: zipfile.ZipInfo, limits: UploadLimits) -> None:
    name = entry.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")) or "\0" in name:
        raise UnreadableFile("the zip names a place outside of itself; make it again from the series' folder")
    if len(parts) > limits.max_depth:
        raise UnreadableFile(f"the zip has folders {len(parts)} deep; at most {limits.max_depth} are read")
    if entry.flag_bits & 1:
        raise UnreadableFile("the zip is encrypted; send it without a password over a protected connection")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnreadableFile("the zip holds a link or a device; expected files only")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableFile("the zip uses another compression than deflate; make it again with the usual settings")
    if name.lower().endswith(ARCHIVES):
        raise UnreadableFile("the zip holds another archive; expected the DICOM files of one series")


def _left_out(entry: zipfile.ZipInfo) -> bool:
    """What media and systems add beside the images."""
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    return path.name.lower() in LEFT_OUT or path.name.startswith(".") or "__MACOSX" in path.parts


def _unpack(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], folder: Path) -> list[Path]:
    files = []
    for number, entry in enumerate(entries):
        with archive.open(entry) as source:
            start = source.read(132)
            if start.startswith(ARCHIVE_STARTS):
                raise UnreadableFile("the zip holds another archive; expected the DICOM files of one series")
            if start[128:] != b"DICM":
                continue
            target = folder / f"{number:06d}.dcm"
            with target.open("xb") as sink:
                sink.write(start)
                while chunk := source.read(CHUNK_BYTES):
                    sink.write(chunk)
            files.append(target)
    if not files:
        raise UnreadableFile(
            f"none of the {len(entries)} files in the zip is DICOM (the DICM mark is missing); send NIfTI and NRRD as "
            "they are"
        )
    return files
