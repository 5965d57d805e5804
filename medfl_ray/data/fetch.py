"""Public data sets, fetched from their source by MONAI's downloader."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

from medfl_ray.errors import ConfigError, DataError, UnreadableFile


class PublicDataSet(NamedTuple):
    """A data set of the Medical Segmentation Decathlon, by its name there."""

    task: str
    licence: str


DATA_SETS = {"hippocampus": PublicDataSet("Task04_Hippocampus", "CC-BY-SA-4.0")}


def fetch(name: str, out: Path, archive: Path | None = None) -> Path:
    """Download (or take a local archive of) a public data set, unpack it below `out` and return its folder.

    A download is checked against the MD5 that MONAI records; of a local archive only the copy is checked.

    Raises:
      ConfigError: the data set is not known, or the archive does not exist.
      UnreadableFile: the download failed or the archive is damaged.
      DataError: the folder cannot be written.
    """
    from monai.apps.datasets import DecathlonDataset
    from monai.apps.utils import HashCheckError, download_url, extractall

    if name not in DATA_SETS:
        raise ConfigError(f"no public data set {name!r}; known are {', '.join(DATA_SETS)}")
    task = DATA_SETS[name].task
    if archive is not None and not archive.is_file():
        raise ConfigError(f"the archive {archive.name!r} does not exist; check --archive")
    url = archive.resolve().as_uri() if archive is not None else DecathlonDataset.resource[task]
    checksum = _md5(archive) if archive is not None else DecathlonDataset.md5[task]
    folder = out / task
    existed = folder.exists()
    target = out / f"{task}{''.join(archive.suffixes[-2:]) if archive is not None else '.tar'}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        download_url(url, target, checksum, "md5", progress=False)
        extractall(target, out, checksum, "md5")
    except HashCheckError:
        target.unlink(missing_ok=True)
        raise UnreadableFile("the download does not have the recorded checksum; it was removed, try again") from None
    except OSError as error:
        raise DataError(
            f"cannot fetch into {out.name!r} ({error.__class__.__name__}: "
            f"{getattr(error, 'reason', None) or error.strerror}); "
            "check the network, free space and permissions, or give --archive FILE"
        ) from None
    except Exception as error:  # noqa: BLE001 - tarfile, zlib and MONAI each have errors of their own
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)  # a half-unpacked folder would pass for a whole one next time
        raise UnreadableFile(f"the archive cannot be unpacked ({type(error).__name__}); fetch it again") from None
    finally:
        if archive is not None:
            target.unlink(missing_ok=True)
    if not folder.is_dir():
        raise UnreadableFile(f"the archive holds no folder {task!r}; it is another data set")
    return folder


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
