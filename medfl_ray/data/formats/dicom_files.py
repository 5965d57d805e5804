"""Finding and opening DICOM files; parsing itself is pydicom's."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from pydicom import config, dcmread
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError

from medfl_ray.data.formats.jpeg_frames import add_to_pydicom
from medfl_ray.errors import DataError, UnreadableFile

# Warnings about ill-formed values quote the value, which may be a name; what matters is checked by our readers.
config.settings.reading_validation_mode = config.IGNORE
# Results repeat values of the images, ill-formed ones too.
config.settings.writing_validation_mode = config.IGNORE
add_to_pydicom()

# Objects that stand beside images and have no voxels of their own, or voxels that are labels.
LABEL_MODALITIES = {"SEG", "RTSTRUCT"}
NOT_IMAGES = {*LABEL_MODALITIES, "SR", "PR", "KO", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "DOC", "ANN", "FID", "RWV"}

OTHER_FORMATS = {".mha", ".mhd", ".mgz", ".mgh", ".hdr", ".img", ".npy", ".npz", ".svs", ".zip", ".bmp", ".gif"}


def open_dicom(path: Path, pixels: bool = True) -> FileDataset:
    """Parse one DICOM file.

    Raises:
      UnreadableFile: the file is truncated or is not DICOM.
    """
    try:
        dataset = dcmread(path, stop_before_pixels=not pixels)
    except InvalidDicomError:
        if path.suffix.lower() in OTHER_FORMATS:
            raise UnreadableFile(
                f"the format {path.suffix} is not supported; expected DICOM, NIfTI, NRRD, PNG, JPEG or TIFF"
            ) from None
        raise UnreadableFile(
            "not a DICOM file (the DICM mark is missing); remove it from the folder or convert it"
        ) from None
    except (
        EOFError, ValueError, KeyError, NotImplementedError, AttributeError, TypeError, RecursionError, zlib.error,
    ) as error:  # fmt: skip
        raise UnreadableFile(
            f"the DICOM file is damaged ({type(error).__name__}); export it again from its archive"
        ) from None
    if not dataset.get("SOPClassUID") and "Modality" not in dataset:
        raise UnreadableFile(
            "the DICOM file says neither what object it is nor its modality; it is truncated or not an image"
        )
    return dataset


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM mark at byte 128."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def dicom_files(folder: Path, recursive: bool = False, damaged: list[DataError] | None = None) -> Iterator[Path]:
    """Yield the DICOM files of a folder in a fixed order; directories of media (DICOMDIR) are left out.

    Args:
      damaged: takes what is wrong with files that cannot be opened, or are called .dcm and are not DICOM; these are
        then passed over.

    Raises:
      UnreadableFile: a file called .dcm is not DICOM.
    """
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if path.name.upper() == "DICOMDIR" or path.name.startswith("."):
            continue
        try:
            if _holds_object(path):
                yield path
        except UnreadableFile as error:
            if damaged is None:
                raise
            damaged.append(error)
        except OSError as error:
            if damaged is None:
                raise
            problem = f"a file cannot be opened ({type(error).__name__}); check its permissions and the disk"
            damaged.append(UnreadableFile(problem))


def _holds_object(path: Path) -> bool:
    if is_dicom(path):
        return True
    if path.suffix.lower() in (".dcm", ".dicom", ".ima") and path.is_file():
        raise UnreadableFile(
            f"a file of {path.stat().st_size} bytes is called {path.suffix} but is not DICOM (the DICM mark is "
            "missing); export it again from its archive"
        )
    return False
