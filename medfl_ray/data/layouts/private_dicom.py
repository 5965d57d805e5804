"""A folder of DICOM files with private data: every case against the names of the run, and against nothing else.

A folder has no header that could name channels and labels. Taking them from the files, as of public data, would let one
patient decide what the images of all others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medfl_ray.data.cases import Case, CaseIndex, unusable
from medfl_ray.data.layouts.dicom_folder import LabelObject, Series, companions_of, scan, target_of
from medfl_ray.errors import ConfigError, DataError, LayoutError


def read_private_dicom_folder(directory: Path, channels: tuple[str, ...]) -> CaseIndex:
    """List the cases, one per label object, each with the series that the channels name.

    A case whose patient has no such series, or several, has a `problem`; so has each file that cannot be read.

    Args:
      channels: descriptions of the series, as the run names them; case does not matter.

    Raises:
      ConfigError: the run names no channels.
      LayoutError: a file was given instead of a folder.
    """
    if not channels:
        raise ConfigError(
            "a folder of DICOM files does not name its channels, and taking them from private images would let one "
            "patient change all others; name them in data.channels, as the series are described"
        )
    if not directory.is_dir():
        raise LayoutError("the DICOM layout needs a folder of patients; a file was given")
    damaged: list[DataError] = []
    series, labels, notes = scan(directory, damaged)
    cases = [_case(label, series, channels) for label in sorted(labels, key=lambda one: (one.patient, one.path))]
    return CaseIndex((*map(unusable, damaged), *cases), channels, {}, notes)


def _case(label: LabelObject, series: Sequence[Series], channels: tuple[str, ...]) -> Case:
    own = [one for one in series if one.patient == label.patient]
    try:
        target = target_of(label, own)
        chosen = [_named(name, target, own, len(channels)) for name in channels]
    except DataError as error:
        return unusable(error, label.patient, label.path.stem)
    return Case(
        label.patient,
        f"{label.patient}-{label.path.stem}",
        tuple(one.folder for one in chosen),
        label.path,
        None,
        {f"series_{i}": one.uid for i, one in enumerate(chosen)},
        tuple(one.files for one in chosen),
    )


def _named(name: str, target: Series, own: Sequence[Series], num_channels: int) -> Series:
    """Return the series of a channel, in the frame of reference of the one on which the label was drawn."""
    found = [one for one in companions_of(target, list(own)) if one.name.casefold() == name.casefold()]
    if not found and num_channels == 1 and not target.name:
        return target  # a series without a description contradicts no name
    if len(found) != 1:
        raise LayoutError(
            f"its patient has {len(found)} series described as {name!r} where the label was drawn; expected one"
        )
    return found[0]
