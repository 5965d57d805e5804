"""How much an upload may ask for: sizes, counts, ratios, memory and time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from medfl_ray.errors import UnreadableFile

MIB = 1024**2
CHUNK_BYTES = MIB
RATIO_COUNTS_FROM = 64 * MIB

# Called with the bytes that a header has asked for once they are believed; memory and time may then grow with them.
Grant = Callable[[int], None]


class UploadLimits(BaseModel):
    """Bounds on an upload; what lies beyond them is refused before memory is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_upload_bytes: int = Field(default=2 * 1024 * MIB, gt=0, description="Bytes of one request's body.")
    max_unpacked_bytes: int = Field(default=4 * 1024 * MIB, gt=0, description="Bytes after unpacking, of all files.")
    max_files: int = Field(default=20_000, gt=0, description="Files in an archive.")
    max_depth: int = Field(default=16, gt=0, description="Folders within folders in an archive.")
    max_ratio: int = Field(default=200, gt=0, description="Unpacked over packed bytes, from 64 MiB unpacked.")
    max_edge: int = Field(default=16_384, gt=0, description="Voxels along one axis.")
    max_frame_pixels: int = Field(default=24 * MIB, gt=0, description="Pixels of one slice or picture.")
    max_voxels: int = Field(default=512 * MIB, gt=0, description="Voxels of a volume, over all channels.")
    max_header_bytes: int = Field(default=16 * MIB, gt=0, description="Bytes of one file that are not voxels.")
    memory_bytes: int = Field(default=512 * MIB, gt=0, description="Memory before an image's header is believed.")
    seconds: float = Field(default=4.0, gt=0, description="Time before an image's header is believed.")
    bytes_per_second: int = Field(default=20 * MIB, gt=0, description="Slowest reading; larger uploads get more time.")
    upload_seconds: float = Field(default=900.0, gt=0, description="Time in which a request's body must arrive.")


def no_grant(num_bytes: int) -> None:
    """Leave memory and time as they are: the reader runs in its caller's process."""


def check_shape(shape: tuple[int, ...], limits: UploadLimits) -> int:
    """Return the number of voxels of a claimed shape.

    Raises:
      UnreadableFile: an axis is not positive or too long, or there are too many voxels.
    """
    total = 1
    for edge in shape:
        if edge < 1:
            raise UnreadableFile(f"the header gives an axis {edge} voxels; every axis needs at least 1")
        if edge > limits.max_edge:
            raise UnreadableFile(f"the header gives an axis {edge} voxels; at most {limits.max_edge} are read")
        total *= edge
    if total > limits.max_voxels:
        raise UnreadableFile(
            f"the header claims {total} voxels; at most {limits.max_voxels} are read. Crop or resample the image"
        )
    return total


def check_ratio(unpacked: int, packed: int, limits: UploadLimits) -> None:
    """Refuse what unpacks to far more than images do.

    Raises:
      UnreadableFile: beyond the limits.
    """
    if unpacked > limits.max_unpacked_bytes:
        raise UnreadableFile(
            f"the upload unpacks to {unpacked // MIB} MiB; at most {limits.max_unpacked_bytes // MIB} MiB are read"
        )
    if unpacked > RATIO_COUNTS_FROM and unpacked > limits.max_ratio * max(packed, 1):
        raise UnreadableFile(
            f"the upload unpacks to more than {limits.max_ratio} times its size; images do not, send it uncompressed"
        )


def copy_exactly(source: BinaryIO, target: Path, num_bytes: int) -> None:
    """Copy a stream of a known length to a file; one chunk more than it should have ends the copy.

    Raises:
      UnreadableFile: the stream is shorter or much longer.
    """
    written = 0
    with target.open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > num_bytes + CHUNK_BYTES:
                raise UnreadableFile("the file holds far more voxels than its header says; write it again")
            sink.write(chunk)
    if written < num_bytes:
        raise UnreadableFile(
            f"the file is truncated: its header needs {num_bytes} bytes and {written} are there; copy it again"
        )
