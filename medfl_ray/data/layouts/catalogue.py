"""Known layouts of a folder of images, read as they are: Decathlon, nnU-Net raw, a manifest, DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.layouts.partitions import check_splits, with_one_side_each
from medfl_ray.errors import ConfigError, LayoutError

EXPECTED = (
    "a Decathlon dataset.json, an nnU-Net raw folder (imagesTr, labelsTr, dataset.json), a manifest.csv or "
    "manifest.json with patient_id, image, label, split, or folders of DICOM files"
)


def discover_cases(directory: Path, format: str = "auto", named: tuple[str, ...] | None = None) -> CaseIndex:
    """List the cases of a folder, of data that are not private without a single `problem`.

    Args:
      named: the channels that the run names, where the data are private. Nothing is then derived from the cases as a
        whole: what is wrong with one of them is its own `problem`, and moves no other.

    Raises:
      ConfigError: the folder does not exist or may not be read, or private data have no names.
      LayoutError: it is not of the given format, contradicts itself, or holds no case.
    """
    index = list_cases(directory, format, named)
    if named is not None:
        return index
    for case in index.cases:
        if case.problem is not None:
            raise case.problem
    check_splits(index.cases)
    check_owners(index.cases)
    return index


def list_cases(directory: Path, format: str = "auto", named: tuple[str, ...] | None = None) -> CaseIndex:
    """List the cases of a folder with the `problem` of each that cannot be used, for the owner of the data.

    Args:
      named: as for `discover_cases`.

    Raises:
      ConfigError, LayoutError: as `discover_cases`, of the folder and of lists that cannot be read at all.
    """
    try:
        kind = _detect(directory, named is not None) if format == "auto" else format
        index = _read(kind, directory, named)
    except PermissionError:
        raise ConfigError(
            f"the data folder {directory.name!r} may not be read by this user; change its permissions"
        ) from None
    except OSError as error:
        raise LayoutError(f"the folder {directory.name!r} cannot be read: {error.strerror}; check the disk") from None
    if not index.cases:
        raise LayoutError(f"the folder {directory.name!r} ({kind} layout) holds no case; expected at least 2 patients")
    return index if named is None else replace(index, cases=with_one_side_each(index.cases))


def _read(kind: str, directory: Path, named: tuple[str, ...] | None) -> CaseIndex:
    if kind == "decathlon":
        from medfl_ray.data.layouts.decathlon import read_decathlon

        return read_decathlon(directory, named is not None)
    if kind == "nnunet":
        from medfl_ray.data.layouts.decathlon import read_nnunet

        return read_nnunet(directory, named is not None)
    if kind == "manifest":
        if named is not None:
            from medfl_ray.data.layouts.private_manifest import read_private_manifest

            return read_private_manifest(directory, named)
        from medfl_ray.data.layouts.manifest import read_manifest

        return read_manifest(directory)
    if named is None:
        from medfl_ray.data.layouts.dicom_folder import read_dicom_folder

        return read_dicom_folder(directory)
    from medfl_ray.data.layouts.private_dicom import read_private_dicom_folder

    return read_private_dicom_folder(directory, named)


def _detect(directory: Path, header_only: bool = False) -> str:
    if not directory.exists():
        raise ConfigError(f"the data folder {directory.name!r} does not exist; check data.directory")
    if directory.is_file():
        return "manifest"
    names = {entry.name for entry in directory.iterdir()}
    if names & {"manifest.csv", "manifest.json"}:
        return "manifest"
    if "dataset.json" in names:
        return _around_dataset_json(directory, header_only)
    # Any other CSV may be a patient's own; where it is the list of private data, data.format says so.
    if not header_only and len([name for name in names if name.endswith(".csv")]) == 1:
        return "manifest"
    if not names:
        raise LayoutError(f"the folder {directory.name!r} is empty; expected {EXPECTED}")
    from medfl_ray.data.layouts.dicom_folder import holds_dicom

    if holds_dicom(directory):
        return "dicom"
    raise LayoutError(f"the folder {directory.name!r} has no known layout; expected {EXPECTED}")


def _around_dataset_json(directory: Path, header_only: bool) -> str:
    """Tell nnU-Net from Decathlon: version 1 of nnU-Net lists image names that lack the channel's _0000.

    Of private data no entry is looked at, so that one patient does not decide how all are read: version 2 of nnU-Net
    names its own fields, and a folder of version 1 is named by data.format.
    """
    from medfl_ray.data.layouts.decathlon import read_json

    raw = read_json(directory / "dataset.json", header_only)
    if header_only:
        return "nnunet" if {"channel_names", "file_ending"} & raw.keys() else "decathlon"
    entries = raw.get("training")
    first = entries[0] if isinstance(entries, list) and entries else {}
    image = first.get("image") if isinstance(first, dict) else None
    listed = directory / str(image[0] if isinstance(image, list) and image else image)
    if not listed.is_file() and any((directory / "imagesTr").glob("*_0000.*")):
        return "nnunet"
    return "decathlon"


def check_owners(cases: Sequence[Case]) -> None:
    """Refuse an image that is listed for two patients: it would train one and evaluate the other.

    Raises:
      LayoutError: with the positions of two such cases.
    """
    first: dict[tuple[Path, str], int] = {}
    for position, case in enumerate(cases):
        for i, path in enumerate(case.images):
            other = first.setdefault((path, case.fields.get(f"series_{i}", "")), position)
            if cases[other].patient_id != case.patient_id:
                raise LayoutError(
                    f"cases {other + 1} and {position + 1} of {len(cases)} list one image for two patients; "
                    "correct patient_id or the path"
                )
