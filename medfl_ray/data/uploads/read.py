"""One image from somebody else, in any format that clinicians send, read under limits.

The format is told by the file's first bytes, never by its name. Nothing here trusts a length, a count or a name that
the upload states; a process of its own around it (uploads/process.py) bounds memory and time as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydicom.dataset import FileDataset

from medfl_ray.data.uploads.archive import is_zip, unpack_dicom
from medfl_ray.data.uploads.dicom import headers_of, read_dicom_upload
from medfl_ray.data.uploads.limits import Grant, UploadLimits, no_grant
from medfl_ray.data.uploads.nifti import is_nifti, read_nifti_upload
from medfl_ray.data.uploads.nrrd import read_nrrd_upload
from medfl_ray.data.volume import Volume
from medfl_ray.errors import DataError, UnreadableFile

Kind = Literal["nifti", "nrrd", "dicom"]


@dataclass(frozen=True, eq=False)
class Upload:
    """A volume and what results must refer to: the DICOM files of its slices, in order; none for other formats."""

    volume: Volume
    kind: Kind
    files: tuple[Path, ...] = field(default=(), repr=False)

    @cached_property
    def headers(self) -> tuple[FileDataset, ...]:
        """The DICOM headers in the order of the slices, without pixels."""
        return headers_of(self.files)


@contextmanager
def opened_upload(
    path: Path, limits: UploadLimits, series: Sequence[str] = (), grant: Grant = no_grant
) -> Iterator[Upload]:
    """Read an upload with a temporary folder for what is unpacked; the folder goes with the block."""
    with tempfile.TemporaryDirectory(prefix="medfl-upload-") as folder:
        yield read_upload(path, limits, Path(folder), series, grant)


def read_upload(
    path: Path, limits: UploadLimits, workspace: Path, series: Sequence[str] = (), grant: Grant = no_grant
) -> Upload:
    """Read a NIfTI or NRRD file, a DICOM file, a zip of DICOM files, or a folder of them.

    Args:
      workspace: an empty folder for what is unpacked; the upload's DICOM headers are read from it later.
      series: SeriesInstanceUIDs, where the upload holds several series; each becomes a channel.
      grant: called when a header is believed, with the bytes of memory that it asks for.

    Raises:
      DataError: the upload is damaged, hostile or of an unknown format; the sentence holds no identifier.
    """
    try:
        return _read(path, limits, workspace, series, grant)
    except DataError:
        raise
    except MemoryError:
        raise UnreadableFile("the upload asks for more memory than it may have; it is damaged, or too large") from None
    except RecursionError:
        raise UnreadableFile("the upload is nested too deeply; it is damaged") from None
    except OSError as error:
        raise UnreadableFile(f"the file cannot be read ({error.strerror or type(error).__name__})") from None
    except Exception as error:  # noqa: BLE001 - a stranger's values fail anywhere: as numbers, as text, as sequences
        raise UnreadableFile(
            f"the upload is damaged ({type(error).__name__}); export it again from its source"
        ) from None


def _read(path: Path, limits: UploadLimits, workspace: Path, series: Sequence[str], grant: Grant) -> Upload:
    if path.is_dir():
        return _dicom(_files_below(path, limits), series, limits, grant)
    if not path.is_file():
        raise UnreadableFile("there is no such file; expected a NIfTI, NRRD or DICOM file, a zip, or a DICOM folder")
    size = path.stat().st_size
    if size > limits.max_upload_bytes:
        raise UnreadableFile(f"the upload has {size} bytes; at most {limits.max_upload_bytes} are read")
    with path.open("rb") as stream:
        start = stream.read(132)
    if is_zip(start):
        folder = workspace / "dicom"
        folder.mkdir()
        return _dicom(unpack_dicom(path, folder, limits, grant), series, limits, grant)
    if start[128:] == b"DICM":
        return _dicom([path], series, limits, grant)
    if start[:4] == b"NRRD":
        return Upload(read_nrrd_upload(path, workspace, limits, grant), "nrrd")
    if start[:2] == b"\x1f\x8b" or is_nifti(start):
        return Upload(read_nifti_upload(path, workspace, limits, grant), "nifti")
    raise UnreadableFile(
        f"the {size} bytes are of no known format; expected NIfTI (.nii, .nii.gz), NRRD, a DICOM file or a zip of them"
    )


def _dicom(files: Sequence[Path], series: Sequence[str], limits: UploadLimits, grant: Grant) -> Upload:
    volume, ordered = read_dicom_upload(files, series, limits, grant)
    return Upload(volume, "dicom", ordered)


def _files_below(folder: Path, limits: UploadLimits) -> list[Path]:
    from medfl_ray.data.formats.dicom_files import dicom_files

    files = list(dicom_files(folder, recursive=True))
    if len(files) > limits.max_files:
        raise UnreadableFile(f"the folder holds {len(files)} DICOM files; at most {limits.max_files} are read")
    if not files:
        raise UnreadableFile("the folder holds no DICOM file; name a NIfTI or NRRD file itself")
    return files
