"""Known layouts of a folder of images, read as they are: Decathlon, nnU-Net raw, a manifest, DICOM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.partitions import check_splits
from medfl_ray.errors import ConfigError, LayoutError

EXPECTED = (
    "a Decathlon dataset.json, an nnU-Net raw folder (imagesTr, labelsTr, dataset.json), a manifest.csv or "
    "manifest.json with patient_id, image, label, split, or folders of DICOM files"
)


def discover_cases(directory: Path, format: str = "auto") -> CaseIndex:
    """List the cases of a folder.

    Raises:
      ConfigError: the folder does not exist or may not be read.
      LayoutError: it is not of the given format, contradicts itself, or holds no case.
    """
    try:
        kind = _detect(directory) if format == "auto" else format
        index = _reader(kind)(directory)
    except PermissionError:
        raise ConfigError(
            f"the data folder {directory.name!r} may not be read by this user; change its permissions"
        ) from None
    except OSError as error:
        raise LayoutError(f"the folder {directory.name!r} cannot be read: {error.strerror}; check the disk") from None
    if not index.cases:
        raise LayoutError(f"the folder {directory.name!r} ({kind} layout) holds no case; expected at least 2 patients")
    check_splits(index.cases)
    _check_owners(index.cases)
    return index


def _reader(kind: str) -> Callable[[Path], CaseIndex]:
    if kind == "decathlon":
        from medfl_ray.data.decathlon import read_decathlon

        return read_decathlon
    if kind == "nnunet":
        from medfl_ray.data.decathlon import read_nnunet

        return read_nnunet
    if kind == "manifest":
        from medfl_ray.data.manifest import read_manifest

        return read_manifest
    from medfl_ray.data.dicom_folder import read_dicom_folder

    return read_dicom_folder


def _detect(directory: Path) -> str:
    if not directory.exists():
        raise ConfigError(f"the data folder {directory.name!r} does not exist; check data.directory")
    if directory.is_file():
        return "manifest"
    names = {entry.name for entry in directory.iterdir()}
    if names & {"manifest.csv", "manifest.json"}:
        return "manifest"
    if "dataset.json" in names:
        return _around_dataset_json(directory)
    if len([name for name in names if name.endswith(".csv")]) == 1:
        return "manifest"
    if not names:
        raise LayoutError(f"the folder {directory.name!r} is empty; expected {EXPECTED}")
    from medfl_ray.data.dicom_folder import holds_dicom

    if holds_dicom(directory):
        return "dicom"
    raise LayoutError(f"the folder {directory.name!r} has no known layout; expected {EXPECTED}")


def _around_dataset_json(directory: Path) -> str:
    """Tell nnU-Net from Decathlon: version 1 of nnU-Net lists image names that lack the channel's _0000."""
    from medfl_ray.data.decathlon import read_json

    entries = read_json(directory / "dataset.json").get("training")
    first = entries[0] if isinstance(entries, list) and entries else {}
    image = first.get("image") if isinstance(first, dict) else None
    listed = directory / str(image[0] if isinstance(image, list) and image else image)
    if not listed.is_file() and any((directory / "imagesTr").glob("*_0000.*")):
        return "nnunet"
    return "decathlon"


def _check_owners(cases: Sequence[Case]) -> None:
    """Refuse an image that is listed for two patients: it would train one and evaluate the other."""
    first: dict[tuple[Path, str], int] = {}
    for position, case in enumerate(cases):
        for i, path in enumerate(case.images):
            other = first.setdefault((path, case.fields.get(f"series_{i}", "")), position)
            if cases[other].patient_id != case.patient_id:
                raise LayoutError(
                    f"cases {other + 1} and {position + 1} of {len(cases)} list one image for two patients; "
                    "correct patient_id or the path"
                )
