"""The data section of a run: where the images are, what they show, who has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from medfl_ray.config.base import DataKind, HospitalId, Positive, PositiveFloat, Section, one_to_many


class PhantomConfig(Section):
    """Synthetic head MR, rendered on demand at each hospital."""

    preset: str = Field(
        "brain_tumour", description="Name of a preset in medfl_ray/data/phantoms/presets, or a YAML file."
    )
    num_hospitals: Positive = Field(4, description="Number of hospitals, each with its own scanner profile.")
    patients_per_hospital: Positive = Field(40, description="Number of patients per hospital, held-out ones included.")
    size_voxels: Annotated[int, Field(ge=16, le=256)] = Field(
        64, description="Edge length of the cubic volume in voxels."
    )
    seed: int = Field(0, description="Seed of the anatomy, lesions and scanner noise of the phantoms.")
    labelmaps: Path | None = Field(None, description="Folder of label maps to render instead of the MNI152 template.")


class PartitionConfig(Section):
    """How one folder of cases becomes several simulated hospitals."""

    by: Literal["single", "field", "dirichlet", "iid"] = Field(
        "single", description="Rule that deals patients to hospitals."
    )
    field: str | None = Field(
        None, description="Field of the case list whose values name the hospitals, for by: field."
    )
    num_hospitals: Positive = Field(3, description="Number of hospitals, for by: dirichlet and iid.")
    alpha: PositiveFloat = Field(0.5, description="Concentration of the Dirichlet draw; small values skew the sizes.")

    @model_validator(mode="after")
    def _field_is_named(self) -> Self:
        if self.by == "field" and not self.field:
            raise ValueError("partition.by is 'field', so partition.field must name a field of the case list")
        return self


class HospitalConfig(Section):
    """One hospital with a folder of its own."""

    id: HospitalId = Field(description="Name of the hospital in plans, receipts and reports.")
    directory: Path | None = Field(
        None, description="Folder of the hospital's images; taken from site_config when absent."
    )
    site_config: Path | None = Field(
        None, description="The hospital's own hospital_config.yaml; its policy wins over the run."
    )
    data_set: HospitalId | None = Field(None, description="Name of the data set in the hospital's ledger.")
    declared: DataKind | None = Field(
        None, description="What the hospital's data are; the run's data.declared by default."
    )
    num_patients: Positive | None = Field(None, description="Rounded, public number of training patients.")
    num_cases: Positive | None = Field(
        None, description="Rounded, public number of training cases, for aggregation.weighting: cases."
    )
    max_epsilon: PositiveFloat | None = Field(
        None, description="Lifetime patient-level epsilon budget of the data set."
    )


class DataConfig(Section):
    """Where the images are, what they show and how they are prepared."""

    directory: Path | None = Field(None, description="Folder that is partitioned into hospitals.")
    phantom: PhantomConfig | None = Field(None, description="Synthetic data instead of a folder.")
    hospitals: tuple[HospitalConfig, ...] = Field(
        (), description="Hospitals with a folder each, instead of data.directory."
    )
    partition: PartitionConfig = Field(
        default_factory=PartitionConfig, description="How data.directory is dealt to hospitals."
    )
    format: Literal["auto", "decathlon", "nnunet", "manifest", "dicom"] = Field(
        "auto", description="Layout of the folder."
    )
    name: HospitalId = Field("dataset", description="Name of the data set in the hospitals' ledgers.")
    declared: DataKind = Field(
        "private", description="Whether the data are private, public or synthetic; decides what may be shown."
    )
    trust_domain: Literal["separate", "single"] = Field(
        "separate", description="'single' declares that all hospitals belong to one institution that may pool its data."
    )
    task: Literal["segmentation", "classification"] = Field("segmentation", description="What the model learns.")
    labels: dict[int, str] = Field(
        default_factory=dict,
        description="Names of the label values above 0; read from the data when empty, of private data from the "
        "layout's own header alone.",
    )
    channels: tuple[str, ...] = Field(
        (),
        description="Names of the image channels; read from the data when empty, of private data from the layout's own "
        "header alone.",
    )
    spatial_dims: Literal[2, 3] = Field(3, description="2 for images, 3 for volumes.")
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="Fraction of patients held out per hospital for evaluation."
    )
    spacing_mm: Annotated[tuple[PositiveFloat, ...], BeforeValidator(one_to_many)] | None = Field(
        None, description="Voxel spacing to resample to, in mm per axis; the image's own when absent."
    )
    intensity: Literal["zscore", "percentile", "window", "none"] = Field(
        "zscore", description="Per-volume intensity normalisation; nothing is fitted over patients."
    )
    window: tuple[float, float] | None = Field(
        None, description="Lower and upper intensity for intensity: window (Hounsfield units in CT)."
    )
    cache: Literal["memory", "disk", "none"] = Field(
        "memory", description="Where prepared volumes are kept, so that each is decoded once."
    )
    cache_mb: Positive | None = Field(
        None,
        description="Most memory in MB for prepared volumes per process, the longest unused dropped first; without it "
        "no limit, in a simulation half of the machine's memory over all processes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _phantoms_are_synthetic(cls, raw: Any) -> Any:
        # Written out, so that a dumped configuration, with every default in it, loads again.
        if isinstance(raw, dict) and raw.get("phantom") is not None:
            return {"declared": "synthetic", **raw}
        return raw

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [self.directory is not None, self.phantom is not None, bool(self.hospitals)]
        if sum(sources) != 1:
            raise ValueError("data needs exactly one of: directory, phantom, hospitals")
        if self.phantom is not None and self.declared != "synthetic":
            raise ValueError("data.phantom is synthetic; remove data.declared or set it to 'synthetic'")
        if self.intensity == "window" and (self.window is None or self.window[0] >= self.window[1]):
            raise ValueError("data.intensity is 'window', so data.window must be [lower, upper] with lower < upper")
        ids = [h.id for h in self.hospitals]
        if len(set(ids)) != len(ids):
            raise ValueError(f"data.hospitals names a hospital twice: {sorted({i for i in ids if ids.count(i) > 1})}")
        if any(value <= 0 for value in self.labels):
            raise ValueError("data.labels names value 0 or below; 0 is the background and has no name")
        return self

    @property
    def effective_declared(self) -> DataKind:
        """What the data are: phantoms are synthetic whatever the field says."""
        return "synthetic" if self.phantom is not None else self.declared
