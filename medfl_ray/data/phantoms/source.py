"""Synthetic hospitals: patients rendered when they are first needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medfl_ray.config.data import PhantomConfig
from medfl_ray.config.run import RunConfig
from medfl_ray.data.cases import Case, CaseIndex, PreparedCase
from medfl_ray.data.layouts.partitions import split_holdout
from medfl_ray.data.phantoms.preset import load_preset
from medfl_ray.data.prepare.dataset import HospitalCases
from medfl_ray.data.prepare.loading import name_classes, pick_channels
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.volume import Volume
from medfl_ray.errors import ConfigError


@dataclass(frozen=True)
class PhantomLoader:
    """Renders and prepares one synthetic patient when called."""

    phantom: PhantomConfig
    hospital_index: int
    patient_index: int
    preprocessing: Preprocessing
    picked: tuple[int, ...] | None

    def __call__(self) -> PreparedCase:
        """Render and prepare the patient."""
        from medfl_ray.data.phantoms.render import render_phantom

        config = self.phantom
        phantom = render_phantom(
            config.preset, self.hospital_index, self.patient_index, config.size_voxels, config.seed, config.labelmaps
        )
        image = phantom.image if self.picked is None else phantom.image[list(self.picked)]
        label: Volume | int = (
            Volume(phantom.label[None].astype(np.float32), phantom.affine)
            if isinstance(phantom.label, np.ndarray)
            else int(phantom.label)
        )
        prepared = self.preprocessing.prepare(Volume(image, phantom.affine), label)
        return PreparedCase(
            phantom.patient_id, phantom.patient_id, prepared.image, prepared.label, prepared.affine, prepared.spacing_mm
        )


def phantom_hospital_names(phantom: PhantomConfig) -> tuple[str, ...]:
    """Names of the synthetic hospitals, in order of their index.

    Raises:
      ConfigError: the preset does not exist.
    """
    return _names(phantom.preset, phantom.num_hospitals, phantom.seed)


@lru_cache(maxsize=8)
def _names(preset_name: str, num_hospitals: int, seed: int) -> tuple[str, ...]:
    """Thousands of hospitals are named once per process, not once per hospital that is opened."""
    from medfl_ray.data.phantoms.profiles import hospital_profile

    preset = load_preset(preset_name)
    return tuple(hospital_profile(preset, i, seed).name for i in range(num_hospitals))


def split_phantoms(
    run: RunConfig, phantom: PhantomConfig, hospital_index: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return one synthetic hospital's training and held-out patients, without rendering them.

    Raises:
      ConfigError: there are too few patients to hold one out.
    """
    if phantom.patients_per_hospital < 2:
        raise ConfigError(
            "data.phantom.patients_per_hospital is 1; expected at least 2, one to train on and one to evaluate on"
        )
    cases = [Case(f"P{hospital_index:03d}-{i:04d}", str(i), (), None) for i in range(phantom.patients_per_hospital)]
    return split_holdout(cases, run.data.holdout_fraction, run.federation.seed)


def open_phantom_hospital(run: RunConfig, phantom: PhantomConfig, hospital_index: int) -> HospitalCases:
    """Return one synthetic hospital's loaders.

    Raises:
      ConfigError: the preset's task, dimensions or channels are not the run's.
    """
    preset = load_preset(phantom.preset)
    if (preset.task, preset.spatial_dims) != (run.data.task, run.spatial_dims):
        raise ConfigError(
            f"the preset {preset.name!r} is a {preset.spatial_dims}D {preset.task}; the run's data.task is "
            f"{run.data.task!r} in {run.spatial_dims} dimensions. Set data.task, data.spatial_dims and model.type to "
            "match"
        )
    channels, picked = pick_channels(run.data.channels, preset.channels)
    labels = _labels(run.data.labels, preset.labels)
    values, classes = name_classes(labels, CaseIndex((), channels, {}), run.data.task)
    preprocessing = Preprocessing.from_config(
        run.data, run.spatial_dims, channels, tuple(values) if run.data.task == "segmentation" else ()
    )
    train, holdout = split_phantoms(run, phantom, hospital_index)

    def loader(case: Case) -> PhantomLoader:
        return PhantomLoader(phantom, hospital_index, int(case.case_id), preprocessing, picked)

    return HospitalCases(
        hospital_id=phantom_hospital_names(phantom)[hospital_index],
        declared="synthetic",
        channels=channels,
        labels=classes,
        preprocessing=preprocessing,
        train=tuple((loader(case),) for case in train),
        holdout=tuple(loader(case) for case in holdout),
    )


def _labels(configured: Mapping[int, str], preset: Mapping[int, str]) -> dict[int, str]:
    named = {value: name for value, name in preset.items() if value > 0}
    if configured and set(configured) != set(named):
        raise ConfigError(f"data.labels names {sorted(configured)}; the phantom preset has {sorted(named)}")
    return dict(configured or named)
