"""From a listed case to a prepared one, with messages that say which case it was and not whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medfl_ray.data.cases import Case, CaseIndex, PreparedCase
from medfl_ray.data.formats.readers import read_label, read_series_files, read_volume
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.volume import Volume, same_grid
from medfl_ray.errors import ConfigError, DataError, GeometryError, LabelError, UnreadableFile

MAX_PRIVATE_VOXELS = 2**29
"""Most voxels of a private case, over all channels, as its files hold them and at the model's spacing.

It is the same on every machine, so that what else is in memory never decides whether a case is used. A larger case is
left out; where there is no memory for one that is not, the hospital fails as a whole. One copy takes 2 GiB.
"""


@dataclass(frozen=True)
class CaseLoader:
    """Reads and prepares one case when called.

    `where` names the case in messages: its position, and the file's name only where the data are not private.
    `max_voxels` are the most that its channels may have together, before and after preparation; any number when None.
    """

    case: Case
    preprocessing: Preprocessing
    picked: tuple[int, ...] | None
    labels: Mapping[int, str]
    where: str
    by_name_alone: bool = False
    max_voxels: int | None = None

    @classmethod
    def of_private(
        cls,
        case: Case,
        preprocessing: Preprocessing,
        picked: tuple[int, ...] | None,
        labels: Mapping[int, str],
        where: str,
    ) -> CaseLoader:
        """Return the loader of a private case, which the case and constants alone decide about."""
        return cls(case, preprocessing, picked, labels, where, by_name_alone=True, max_voxels=MAX_PRIVATE_VOXELS)

    def __call__(self) -> PreparedCase:
        """Read and prepare the case.

        Raises:
          DataError: of the kind that the readers raise, with `where` in front.
        """
        try:
            image, label = read_case(self.case, self.labels, self.picked, self.by_name_alone, self.max_voxels)
            prepared = self.preprocessing.prepare(image, label, self.max_voxels)
        except DataError as error:
            raise type(error)(f"{self.where}: {error}") from None
        return PreparedCase(
            self.case.patient_id,
            self.case.case_id,
            prepared.image,
            prepared.label,
            prepared.affine,
            prepared.spacing_mm,
        )


def read_case(
    case: Case,
    labels: Mapping[int, str],
    picked: Sequence[int] | None = None,
    by_name_alone: bool = False,
    max_voxels: int | None = None,
) -> tuple[Volume, Volume | int | None]:
    """Read a case's channels, stacked, and its label.

    Args:
      labels: names of the label values, for DICOM segments.
      picked: which channels to keep, in this order; all when None.
      by_name_alone: match no segment by its number.
      max_voxels: most voxels of all channels together, those that are not picked included; any number when None.

    Raises:
      GeometryError: the channels have more voxels, or do not lie on one grid, or lack one that is picked.
    """
    first, *others = _read_channels(case, max_voxels)
    for i, other in enumerate(others):
        if not same_grid(first, other):
            raise GeometryError(
                f"channel {i + 2} has shape {other.spatial_shape} or lies elsewhere in space than channel 1 "
                f"{first.spatial_shape}; register and resample the channels to one grid"
            )
    arrays = [first.array, *(other.array for other in others)]
    image = Volume(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), first.affine, first.notes)
    if picked is not None:
        if max(picked) >= len(image.array):
            raise GeometryError(f"the image has {len(image.array)} channels; expected at least {max(picked) + 1}")
        image = Volume(image.array[list(picked)], image.affine, image.notes)
    label = read_label(case.label, first, labels, by_name_alone) if isinstance(case.label, Path) else case.label
    return image, label


def _read_channels(case: Case, max_voxels: int | None) -> list[Volume]:
    """Read the files of a case until they have too many voxels together; nothing is stacked before."""
    if case.series:
        volumes = (read_series_files(files) for files in case.series)
    else:
        volumes = (read_volume(path, case.fields.get(f"series_{i}", "")) for i, path in enumerate(case.images))
    read: list[Volume] = []
    num_voxels = 0
    for volume in volumes:
        num_voxels += volume.array.size
        if max_voxels is not None and num_voxels > max_voxels:
            raise GeometryError(
                f"the first {len(read) + 1} file(s) of the image have {num_voxels} voxels together; at most "
                f"{max_voxels} in all are read. Crop the image, or resample it to a larger spacing"
            )
        read.append(volume)
    return read


def check_labelled(cases: Sequence[Case], task: str) -> None:
    """Refuse cases without a label, or with a label of the other task.

    Raises:
      LabelError: with the position of the first such case.
      UnreadableFile: a file of the list does not exist.
    """
    for position, case in enumerate(cases):
        problem = label_problem(case, task, f"case {position + 1} of {len(cases)}")
        if problem is not None:
            raise problem


def label_problem(case: Case, task: str, where: str, num_classes: int | None = None) -> DataError | None:
    """Return what is wrong with a case's label, or with its files; None where it can be trained on.

    Args:
      where: the case, for the message.
      num_classes: of a classification, the class of background included; any number when None.
    """
    if case.problem is not None:
        return case.problem
    if case.label is None:
        return LabelError(f"{where} has no label; add it, or leave the case out of the list")
    if (task == "classification") != isinstance(case.label, int):
        found = "a class" if isinstance(case.label, int) else "a label image"
        return LabelError(
            f"{where} has {found} as its label, but data.task is {task!r}; correct data.task or the label"
        )
    if isinstance(case.label, int) and num_classes is not None and not 0 <= case.label < num_classes:
        return LabelError(f"{where} is of class {case.label}; expected 0 to {num_classes - 1}: name it in data.labels")
    for what, path in [*(("image", p) for p in case.images), ("label", case.label)]:
        if isinstance(path, Path) and not _is_there(path):
            return UnreadableFile(f"{where}: its {what} file does not exist; correct the path in the case list")
    return None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def pick_channels(wanted: tuple[str, ...], found: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the channels' names and which of the image's channels they are (None for all as they come).

    Raises:
      ConfigError: a wanted channel is not in the data.
    """
    if not wanted or not found:
        return wanted or found, None
    known = {name.casefold(): i for i, name in enumerate(found)}
    if all(name.casefold() in known for name in wanted):
        picked = tuple(known[name.casefold()] for name in wanted)
        return wanted, None if picked == tuple(range(len(found))) else picked
    if len(wanted) == len(found):
        return wanted, None
    raise ConfigError(
        f"data.channels is {list(wanted)}; the data have {list(found)}. Name channels that exist, or one per channel"
    )


def name_private_classes(
    configured: Mapping[int, str], header: Mapping[int, str], task: str, hospital: str
) -> tuple[dict[int, str], dict[int, str]]:
    """Return ({label value: name}, {class of the model: name}) of private data: from run or header, never from cases.

    Raises:
      ConfigError: neither names the labels.
    """
    values = {value: name for value, name in sorted((configured or header).items()) if value > 0}
    if not values:
        raise ConfigError(
            f"hospital {hospital!r} has private data whose labels or classes are not named, and to find them among its "
            "patients would reveal what these have; name every class in data.labels"
        )
    if task == "classification":
        return values, values
    return values, _numbered(values)


def _numbered(values: Mapping[int, str]) -> dict[int, str]:
    if max(values) > 255:
        raise ConfigError(f"label value {max(values)} is above 255, the largest that is supported; renumber the labels")
    return {i + 1: name for i, name in enumerate(values.values())}


def name_classes(configured: Mapping[int, str], index: CaseIndex, task: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return ({label value: name}, {class of the model: name}), background apart.

    Raises:
      ConfigError: neither the run nor the layout names the labels.
      LabelError: a class index lies outside the names.
    """
    values = {value: name for value, name in sorted((configured or index.labels).items()) if value > 0}
    if task == "classification":
        highest = max([case.label for case in index.cases if isinstance(case.label, int)], default=1)
        lowest = min([case.label for case in index.cases if isinstance(case.label, int)], default=0)
        values = values or {value: f"class {value}" for value in range(1, highest + 1)}
        if lowest < 0 or highest > max(values, default=1):
            raise LabelError(
                f"class {lowest if lowest < 0 else highest} is outside 0..{max(values)}; name every class in "
                "data.labels"
            )
        return values, values
    if not values:
        raise ConfigError("the layout does not name the label values; set data.labels, for instance {1: tumour}")
    return values, _numbered(values)
