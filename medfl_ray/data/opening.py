"""From the listed cases of one hospital to loaders of prepared volumes; private ones each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medfl_ray.config.base import DataKind
from medfl_ray.config.data import DataConfig
from medfl_ray.config.run import RunConfig
from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.layouts.partitions import split_holdout
from medfl_ray.data.prepare.dataset import HospitalCases
from medfl_ray.data.prepare.loading import (
    CaseLoader,
    check_labelled,
    label_problem,
    name_classes,
    name_private_classes,
    pick_channels,
)
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.errors import ConfigError, DataError, LayoutError


class Site(NamedTuple):
    """Where one hospital's images are and how it wants them read."""

    hospital_id: str
    declared: DataKind
    data: DataConfig
    directory: Path
    num_workers: int


def open_cases(run: RunConfig, site: Site, index: CaseIndex, cases: tuple[Case, ...]) -> HospitalCases:
    """Return one hospital's cases as loaders of prepared volumes; nothing is decoded yet.

    Raises:
      ConfigError, DataError: the cases do not go with the names of the run.
    """
    data = site.data
    if is_private(site):
        return _open_private(run, site, index)
    check_labelled(cases, data.task)
    found = index.channels or _channels_of(cases[0])
    channels, picked = pick_channels(data.channels, found)
    values, classes = name_classes(data.labels, index, data.task)
    train, holdout = split_holdout(cases, data.holdout_fraction, run.federation.seed)
    position = {id(case): i + 1 for i, case in enumerate(cases)}
    preprocessing = _preprocessing(run, data, channels, values)

    def loader(case: Case) -> CaseLoader:
        where = f"hospital {site.hospital_id!r}, case {position[id(case)]} of {len(cases)} ({case.images[0].name})"
        return CaseLoader(case, preprocessing, picked, values, where)

    return HospitalCases(
        hospital_id=site.hospital_id,
        declared=site.declared,
        channels=channels,
        labels=classes,
        preprocessing=preprocessing,
        train=by_patient(train, loader),
        holdout=tuple(loader(case) for case in sorted(holdout, key=lambda c: (c.patient_id, c.case_id))),
    )


def is_private(site: Site) -> bool:
    """Whether nothing may be derived from the hospital's cases as a whole, whatever the run's privacy is."""
    return site.declared == "private"


def _open_private(run: RunConfig, site: Site, index: CaseIndex) -> HospitalCases:
    """Open private data: names from run and header alone, each case by itself; what cannot be used is left out.

    One patient more, or less, moves no other: not by channels or labels, a split, an order or an error.
    """
    data, who = site.data, site.hospital_id
    channels, picked = pick_channels(data.channels, index.channels)
    if not channels:
        raise ConfigError(
            f"hospital {who!r} has private data whose channels are named neither by the run nor by the layout, and to "
            "count them in an image would reveal what its patients have; name them in data.channels"
        )
    values, classes = name_private_classes(data.labels, index.labels, data.task, who)
    num_classes = max(values) + 1 if data.task == "classification" else None
    usable, notes = [], []
    for number, case in enumerate(index.cases, start=1):
        where = f"hospital {who!r}, case {number} of {len(index.cases)}"
        problem = label_problem(case, data.task, where, num_classes)
        if problem is None:
            usable.append((case, where))
        else:
            notes.append(f"case {number} of {len(index.cases)} is not used: {problem}")
    places = {id(case): where for case, where in usable}
    train, holdout = split_holdout(
        [case for case, _ in usable], data.holdout_fraction, run.federation.seed, independently=True
    )
    preprocessing = _preprocessing(run, data, channels, values)

    def loader(case: Case) -> CaseLoader:
        return CaseLoader.of_private(case, preprocessing, picked, values, places[id(case)])

    return HospitalCases(
        hospital_id=who,
        declared=site.declared,
        channels=channels,
        labels=classes,
        preprocessing=preprocessing,
        train=by_patient(train, loader),
        holdout=tuple(loader(case) for case in sorted(holdout, key=lambda case: case.patient_id)),
        notes=tuple(notes),
    )


def by_patient(cases: Sequence[Case], loader: Callable[[Case], CaseLoader]) -> tuple[tuple[CaseLoader, ...], ...]:
    """Return the loaders of each patient's cases, patients in the order of their names."""
    patients: dict[str, list[CaseLoader]] = {}
    for case in cases:
        patients.setdefault(case.patient_id, []).append(loader(case))
    return tuple(tuple(patients[patient]) for patient in sorted(patients))


def _preprocessing(
    run: RunConfig, data: DataConfig, channels: tuple[str, ...], values: Mapping[int, str]
) -> Preprocessing:
    label_values = tuple(values) if data.task == "segmentation" else ()
    return Preprocessing.from_config(data, run.spatial_dims, channels, label_values)


def _channels_of(case: Case) -> tuple[str, ...]:
    """Number the channels of a layout that does not name them, by its first case."""
    try:
        num_channels = sum(
            read_volume(path, case.fields.get(f"series_{i}", "")).array.shape[0] for i, path in enumerate(case.images)
        )
    except DataError as error:
        raise type(error)(f"case 1: {error}") from None
    return tuple(f"channel-{i}" for i in range(num_channels))


def check_one_network(opened: Sequence[HospitalCases]) -> None:
    """Refuse hospitals whose channels or labels differ, since one network is trained on all of them.

    Raises:
      LayoutError: with both.
    """
    for hospital in opened[1:]:
        if (len(hospital.channels), hospital.labels) != (len(opened[0].channels), opened[0].labels):
            raise LayoutError(
                f"hospitals {opened[0].hospital_id!r} and {hospital.hospital_id!r} do not fit one network: channels "
                f"{list(opened[0].channels)} and {list(hospital.channels)}, labels {opened[0].labels} and "
                f"{hospital.labels}. "
                "Name data.channels and data.labels in the run"
            )
