"""The schema of a pretraining on synthetic images: YAML at the edge, frozen objects inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from medfl_ray.config.base import Fraction, Positive, PositiveFloat, Section, one_to_many
from medfl_ray.config.model import ModelConfig

Edge = Annotated[int, Field(ge=0, le=64)]


class CropsConfig(Section):
    """Which structure of the label maps is cut out, and how its images are made up."""

    labelmaps: Path = Field(description="Folder of public whole-head label maps with labels.json, 1 mm per voxel.")
    structures: tuple[Positive, ...] = Field(
        (17, 53),
        description="FreeSurfer indices of the structure, by default of the hippocampus.",
    )
    front_fraction: tuple[Fraction, Fraction] | None = Field(
        (0.33, 0.43),
        description="Cut across the structure: the front part (class 1) has this share of its length. Absent: uncut.",
    )
    margin_voxels: tuple[Edge, Edge] = Field(
        (4, 8), description="Range of the distance between the structure and each border of the crop."
    )
    random_contrast: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3, description="Share of images with any contrast at all; the others look like T1-weighted MR."
    )
    intensity: Literal["zscore", "percentile", "none"] = Field(
        "zscore", description="Per-crop intensity normalisation; the one of the runs to come."
    )


class StepsConfig(Section):
    """How long and how fast the network is pretrained."""

    steps: Positive = Field(3000, description="Optimizer steps (Adam).")
    batch_size: Positive = Field(8, description="Synthetic crops per step, each seen once.")
    learning_rate: PositiveFloat = Field(3e-3, description="First learning rate; it falls as a cosine.")
    loss: Literal["dice_ce", "dice", "cross_entropy", "focal"] = Field("dice_ce", description="Loss per crop.")
    patch_size_voxels: Annotated[tuple[Positive, ...], BeforeValidator(one_to_many)] = Field(
        (40, 56, 40), description="Patch edge lengths in voxels, per axis."
    )
    seed: int = Field(0, description="Seed of the first weights and of every synthetic crop.")


class PretrainConfig(Section):
    """A whole pretraining; it reads no patient's image, so that it costs no epsilon."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(
        description="Name of the weights."
    )
    crops: CropsConfig = Field(description="Synthetic images.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Network, as in the runs to come.")
    training: StepsConfig = Field(default_factory=StepsConfig, description="Pretraining.")
    output: Path = Field(Path("weights/pretrained.safetensors"), description="File of the weights.")

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch edge lengths in voxels, one per axis."""
        size = self.training.patch_size_voxels
        return size if len(size) > 1 else size * 3

    @property
    def out_channels(self) -> int:
        """Output channels, background included."""
        return 2 if self.crops.front_fraction is None else 3
