"""Presets: what kind of examination the phantoms are, in YAML."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import PositiveFloat, Section
from medfl_ray.config.files import parse_model, read_yaml
from medfl_ray.errors import ConfigError

PRESET_FOLDER = Path(__file__).parent / "presets"

Range = tuple[float, float]
Sequence = Literal["T1", "T1c", "T2", "FLAIR"]
Orientation = Literal["axial", "coronal", "sagittal"]


class LesionPreset(Section):
    """Size and look of the tumours."""

    radius_mm: Range = Field((20.0, 30.0), description="Smallest and largest mean radius of the whole tumour.")
    core_share: Range = Field((0.5, 0.72), description="Radius of the core as a share of the whole tumour's.")
    roughness: Annotated[float, Field(ge=0, le=1)] = Field(
        0.28, description="How far noise moves the tumour's border, as a share of its radius."
    )
    visibility: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Weight of the tumour over the tissue it grows in."
    )
    necrosis_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.6, description="Share of tumours with a dead centre."
    )
    mass_effect: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="How strongly the tumour pushes the tissue around it."
    )


class HospitalProfile(Section):
    """One hospital's scanner, patients and annotators."""

    name: str = Field(description="Name of the hospital.")
    field_tesla: PositiveFloat = Field(3.0, description="Field strength; sets the noise and the bias field.")
    snr: PositiveFloat = Field(30.0, description="White matter signal in T1 over the noise's standard deviation.")
    missing: tuple[Sequence, ...] = Field(
        (), description="Sequences the hospital does not acquire; their channel is zero."
    )
    contrast: Annotated[float, Field(gt=0.5, lt=2)] = Field(1.0, description="Exponent on the tissue intensities.")
    contrast_seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the protocol's own tissue intensities.")
    contrast_spread: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.06, description="Standard deviation of those intensities."
    )
    gain: PositiveFloat = Field(1000.0, description="Stored value of a relative intensity of 1.")
    bias_amplitude: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="Peak of the log bias field.")
    slice_thickness_mm: Range = Field(
        (1.0, 5.0), description="Thickness of 3D (T1, T1c) and of 2D (T2, FLAIR) sequences."
    )
    field_of_view_mm: tuple[PositiveFloat, PositiveFloat] = Field(
        (225.0, 225.0), description="Extent in the slice plane and across slices."
    )
    orientation: Orientation = Field("axial", description="Plane in which the slices are acquired.")
    prevalence: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="Share of patients with a tumour.")
    size_factor: Annotated[float, Field(gt=0.3, lt=2)] = Field(1.0, description="Factor on the tumours' radius.")
    annotator_mm: Annotated[float, Field(ge=-4, le=4)] = Field(
        0.0, description="How far the annotators draw outside (or inside) the true border."
    )
    annotator_smoothing_mm: Annotated[float, Field(ge=0, le=6)] = Field(
        0.0, description="Scale below which the annotators round off the border."
    )


class PhantomPreset(Section):
    """One kind of examination: sequences, labels, lesions and the first hospitals."""

    name: str = Field(description="Name of the preset.")
    figure: Literal["head", "ball"] = Field(
        "head", description="A head with a tumour, or for simulations a ball in noise, rendered in under a millisecond."
    )
    task: Literal["segmentation", "classification"] = Field(
        "segmentation", description="Label volume, or one class per slice."
    )
    spatial_dims: Literal[2, 3] = Field(3, description="2 renders one slice per patient, 3 the volume.")
    channels: tuple[Sequence, ...] = Field(description="Sequences, in the order of the image's channels.")
    labels: dict[int, str] = Field(description="Names of the label values; {1: whole} merges core and oedema.")
    lesion: LesionPreset = Field(default_factory=LesionPreset, description="Tumours.")
    prevalence: Range = Field(
        (1.0, 1.0), description="Range of the generated hospitals' share of patients with a tumour."
    )
    hospitals: tuple[HospitalProfile, ...] = Field((), description="The first hospitals; further ones are generated.")

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        allowed = {(1,), (1, 2)} if self.task == "segmentation" else {(0, 1), (1,)}
        if tuple(sorted(self.labels)) not in allowed:
            raise ValueError(
                f"preset labels are {sorted(self.labels)}; expected 1 (whole tumour) or 1 and 2 (core, oedema)"
            )
        if self.figure == "ball":
            if self.task != "segmentation" or len(self.channels) != 1 or len(self.labels) != 1:
                raise ValueError("a preset of balls is a segmentation with one channel and one label")
        elif (self.task == "classification") != (self.spatial_dims == 2):
            raise ValueError("a preset is a 3D segmentation or a 2D classification")
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise ValueError(f"preset channels are {list(self.channels)}; expected each sequence once")
        return self


@lru_cache(maxsize=1)
def preset_names() -> tuple[str, ...]:
    """Names of the presets that ship with the package."""
    return tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))


def load_preset(preset: str | Path | PhantomPreset) -> PhantomPreset:
    """Return a preset by name, from a YAML file, or as it is.

    Raises:
      ConfigError: no preset has the name and no file the path, or its content is wrong.
    """
    if isinstance(preset, PhantomPreset):
        return preset
    if str(preset) in preset_names():
        return _shipped(str(preset))
    path = Path(preset)
    if path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(
            f"no phantom preset {str(preset)!r}; known are {', '.join(preset_names())}, or give a .yaml file"
        )
    return parse_model(PhantomPreset, read_yaml(path), path.name)


@lru_cache(maxsize=16)
def _shipped(name: str) -> PhantomPreset:
    path = PRESET_FOLDER / f"{name}.yaml"
    return parse_model(PhantomPreset, read_yaml(path), path.name)
