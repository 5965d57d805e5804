"""A NRRD file from somebody else: checked before a voxel is allocated, and never a reference to another file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import nrrd
import numpy as np
from nrrd.reader import _TYPEMAP_NRRD2NUMPY as TYPES

from medfl_ray.data.formats.nrrd import volume_from
from medfl_ray.data.uploads.limits import Grant, UploadLimits, check_ratio, check_shape, copy_exactly
from medfl_ray.data.volume import Volume
from medfl_ray.errors import UnreadableFile

MAX_HEADER_BYTES = 64 * 1024
BYTES_PER_VOXEL = 12
PACKED = ("gzip", "gz")
SKIPS = ("line skip", "byte skip", "lineskip", "byteskip")


def read_nrrd_upload(path: Path, workspace: Path, limits: UploadLimits, grant: Grant) -> Volume:
    """Read one .nrrd file with its voxels inside, raw or gzip.

    Raises:
      UnreadableFile: the header makes no sense, claims too much, or points to another file.
    """
    header, start = _header(path)
    shape, dtype = _shape_and_type(header, limits)
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    encoding = str(header.get("encoding", "")).lower()
    plain = workspace / "unpacked.raw"
    with _plain_errors(), path.open("rb") as stream:
        stream.seek(start)
        if encoding == "raw":
            if path.stat().st_size - start < needed:
                raise UnreadableFile(
                    f"the file is truncated: its header needs {needed} bytes of voxels and "
                    f"{path.stat().st_size - start} are there"
                )
            plain = path
        elif encoding in PACKED:
            check_ratio(needed, path.stat().st_size, limits)
            grant(0)
            with gzip.GzipFile(fileobj=stream) as unpacked:
                copy_exactly(cast(BinaryIO, unpacked), plain, needed)
        else:
            raise UnreadableFile(f"the NRRD encoding is {encoding[:20]!r}; expected raw or gzip")
        grant(int(np.prod(shape, dtype=object)) * BYTES_PER_VOXEL)
        offset = start if plain is path else 0
        values = np.memmap(plain, dtype=dtype, mode="r", offset=offset, shape=shape, order="F")
        return volume_from(values, header)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Parse the header, which ends with an empty line, and say where the voxels start."""
    with path.open("rb") as stream:
        text = stream.read(MAX_HEADER_BYTES)
    ends = [place + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (place := text.find(mark)) >= 0]
    if not ends:
        raise UnreadableFile("the NRRD header has no end within 64 KiB; it is damaged")
    end = min(ends)
    with _plain_errors():
        header = dict(nrrd.read_header(io.BytesIO(text[:end])))
    if any(key in header for key in ("data file", "datafile")):
        raise UnreadableFile("the NRRD header points to another file for its voxels; send one .nrrd file that has them")
    if any(int(header.get(key, 0)) for key in SKIPS):
        raise UnreadableFile("the NRRD header skips lines or bytes before its voxels; write the file without")
    return header, end


def _shape_and_type(header: dict[str, Any], limits: UploadLimits) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with _plain_errors():
        shape = tuple(int(size) for size in header["sizes"])
        dimension = int(header["dimension"])
        name = TYPES[str(header["type"])]
        order = {"little": "<", "big": ">"}.get(str(header.get("endian", "little")).lower(), "<")
    if name == "V" or dimension != len(shape) or not 2 <= dimension <= 4:
        raise UnreadableFile(
            f"the NRRD header has dimension {dimension} and {len(shape)} sizes of type {str(header['type'])[:20]!r}; "
            "expected 2 to 4 axes of numbers"
        )
    check_shape(shape, limits)
    return shape, np.dtype(name).newbyteorder(order)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except UnreadableFile:
        raise
    except (nrrd.NRRDError, ValueError, KeyError, TypeError, IndexError, OverflowError, EOFError, zlib.error) as error:
        raise UnreadableFile(f"not a complete NRRD file ({type(error).__name__}); write it again") from None
    except gzip.BadGzipFile:
        raise UnreadableFile("not a complete NRRD file (its voxels are not gzip); write it again") from None
