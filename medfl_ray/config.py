"""The one schema of a run: YAML at the edge, frozen objects inside.

Every field's sentence becomes a row of the reference page. Other accepted names: see `rename_aliases`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Declared = Literal["private", "public", "synthetic"]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
HospitalId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


def _one_to_many(value: Any) -> Any:
    return (value,) if isinstance(value, (int, float, str)) else value


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


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
    declared: Declared | None = Field(
        None, description="What the hospital's data are; the run's data.declared by default."
    )
    num_patients: Positive | None = Field(None, description="Rounded, public number of training patients.")
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
    declared: Declared = Field(
        "private", description="Whether the data are private, public or synthetic; decides what may be shown."
    )
    trust_domain: Literal["separate", "single"] = Field(
        "separate", description="'single' declares that all hospitals belong to one institution that may pool its data."
    )
    task: Literal["segmentation", "classification"] = Field("segmentation", description="What the model learns.")
    labels: dict[int, str] = Field(
        default_factory=dict, description="Names of the label values above 0; read from the data when empty."
    )
    channels: tuple[str, ...] = Field((), description="Names of the image channels; read from the data when empty.")
    spatial_dims: Literal[2, 3] = Field(3, description="2 for images, 3 for volumes.")
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="Fraction of patients held out per hospital for evaluation."
    )
    spacing_mm: Annotated[tuple[PositiveFloat, ...], BeforeValidator(_one_to_many)] | None = Field(
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
    def effective_declared(self) -> Declared:
        """What the data are: phantoms are synthetic whatever the field says."""
        return "synthetic" if self.phantom is not None else self.declared


class ModelConfig(Section):
    """Which network is trained."""

    type: Literal[
        "unet3d", "unet2d", "basic_unet", "segresnet", "dynunet", "attention_unet", "unetr", "swin_unetr", "densenet"
    ] = Field("unet3d", description="Name in the model catalogue.")
    in_channels: Positive | None = Field(None, description="Image channels; read from the data when absent.")
    out_channels: Positive | None = Field(
        None, description="Output channels, background included; read from the data when absent."
    )
    features: tuple[Positive, ...] = Field((8, 16, 32), description="Feature channels per resolution level.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout probability.")
    spatial_dims: Literal[2, 3] | None = Field(
        None, description="Dimensions of the network; those of the data when absent."
    )
    norm: Literal["group", "instance"] = Field(
        "group", description="Normalisation layer; batch norm couples patients and is refused."
    )


class TrainingConfig(Section):
    """How one hospital trains."""

    batch_size: Positive = Field(4, description="Patients per step (expected number under DP).")
    learning_rate: PositiveFloat = Field(1e-2, description="Learning rate of the local optimizer.")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="How the learning rate falls over the rounds."
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="Local optimizer; its state lives for one round."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of sgd, beta1 of adam and adamw.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay of the local optimizer.")
    loss: Literal["dice_ce", "dice", "cross_entropy", "focal"] = Field(
        "dice_ce", description="Loss; computed within one patient."
    )
    patch_size_voxels: Annotated[tuple[Positive, ...], BeforeValidator(_one_to_many)] = Field(
        (32, 32, 32), description="Patch edge lengths in voxels, per axis."
    )
    patches_per_patient: Positive = Field(
        1, description="Patches K whose gradients are averaged into one patient gradient."
    )
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.67, description="Share of patches centred on a labelled voxel."
    )
    augment: bool = Field(True, description="Random flips, scaling and noise on the patches.")
    mixed_precision: bool = Field(
        False, description="bfloat16 autocast in forward and backward; norms and noise stay float64."
    )
    patient_gradients: Literal["auto", "single", "grouped"] = Field(
        "auto", description="Under DP: patient by patient, several as convolution groups, or whichever is faster here."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="'auto' uses a GPU where there is one."
    )
    num_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Threads that decode volumes at start; 0 decodes on first use."
    )
    gpus_per_hospital: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPU share that Ray reserves per actor; 0 shares them evenly."
    )


class FederationConfig(Section):
    """Rounds and who takes part."""

    rounds: Positive = Field(10, description="Number of rounds.")
    local_epochs: PositiveFloat | None = Field(
        None, description="Expected passes over a hospital's patients per round."
    )
    local_steps: Positive | None = Field(None, description="Steps per round, instead of local_epochs.")
    min_clients: Positive = Field(1, description="Updates without which a round is not published.")
    min_available_clients: Positive = Field(1, description="Hospitals that must be present to start.")
    fraction: Fraction = Field(1.0, description="Share of the available hospitals asked in a round.")
    deadline_s: PositiveFloat | None = Field(
        None, description="Seconds after which a round closes without the missing hospitals."
    )
    max_failed_rounds: Annotated[int, Field(ge=0)] = Field(
        2, description="Consecutive rounds below quorum after which the run stops."
    )
    eval_every: Positive = Field(1, description="Rounds between evaluations on the held-out patients.")
    seed: int = Field(
        0, description="Seed of initial weights, selection and, with DP off, of sampling and augmentation."
    )
    pool: Literal["ray", "local"] = Field("ray", description="Ray actors, or all hospitals in one process.")
    num_actors: Positive | None = Field(
        None, description="Ray actors that share the hospitals; one per hospital when absent."
    )
    baselines: tuple[Literal["local", "central"], ...] = Field(
        (), description="Baselines to train beside the federation."
    )

    @model_validator(mode="before")
    @classmethod
    def _enough_are_available(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "min_clients" in raw:
            return {"min_available_clients": raw["min_clients"], **raw}
        return raw

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("federation has both local_epochs and local_steps; keep one")
        if self.min_clients > self.min_available_clients:
            raise ValueError("federation.min_clients exceeds min_available_clients; a round could never be published")
        return self


class PrivacyConfig(Section):
    """Patient-level differential privacy, add/remove adjacency."""

    enable_dp: bool = Field(True, description="Train with DP-SGD; off means that the weights may reveal patients.")
    epsilon: PositiveFloat | None = Field(
        None, description="Patient-level epsilon that the whole run may spend at each hospital."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Delta; min(1e-5, 1 / (10 num_patients)) when absent."
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Clip norm C of one patient's gradient.")
    noise_multiplier: PositiveFloat | None = Field(
        None, description="Noise standard deviation over C; solved from epsilon when absent."
    )
    sample_rate: Fraction | None = Field(None, description="Poisson rate q; batch_size / num_patients when absent.")
    unit: Literal["patient"] = Field("patient", description="What one differing record is.")
    accountant: Literal["pld"] = Field("pld", description="Accountant; PLD of Google's dp-accounting.")

    @model_validator(mode="after")
    def _epsilon_or_sigma(self) -> Self:
        if self.enable_dp and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "privacy.enable_dp is on, so give privacy.epsilon or privacy.noise_multiplier (or set enable_dp: false)"
            )
        return self


class AggregationConfig(Section):
    """How updates become new weights."""

    strategy: Literal["fedavg"] = Field("fedavg", description="Aggregation strategy.")
    mode: Literal["plain"] = Field("plain", description="'plain' sums the updates at the coordinator.")
    weighting: Literal["patients", "uniform"] = Field(
        "patients", description="Weight of a hospital: its public num_patients, or one."
    )
    server_learning_rate: PositiveFloat = Field(1.0, description="Factor on the mean update.")


class OutputConfig(Section):
    """What a run leaves behind."""

    directory: Path = Field(Path("runs"), description="Folder in which the run's own folder is made.")
    state_directory: Path | None = Field(
        None, description="Folder of the hospitals' ledgers; the user's state folder when absent."
    )
    report: bool = Field(True, description="Write report.html.")
    export: bool = Field(True, description="Write model.onnx with its parity figure.")
    keep_checkpoints: Positive = Field(3, description="Checkpoints kept besides the best one.")


SECTION_ALIASES = {"model_config": "model", "fl_config": "federation", "privacy_config": "privacy"}
FIELD_ALIASES = {
    "model": {"model_type": "type"},
    "federation": {"fl_rounds": "rounds", "epochs_per_round": "local_epochs"},
    "privacy": {"enabled": "enable_dp"},
}


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(
        description="Name of the run; part of its folder's name."
    )
    description: str = Field("", description="Free text, shown in the report.")
    tags: tuple[str, ...] = Field((), description="Free labels.")
    data: DataConfig = Field(description="Images and their preparation.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Network.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Local training.")
    federation: FederationConfig = Field(default_factory=FederationConfig, description="Rounds.")
    privacy: PrivacyConfig = Field(description="Differential privacy.")
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig, description="Aggregation.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="Results.")

    @model_validator(mode="before")
    @classmethod
    def _rename_aliases(cls, raw: Any) -> Any:
        return rename_aliases(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _dimensions_agree(self) -> Self:
        dims = self.spatial_dims
        for where, values in (
            ("training.patch_size_voxels", self.training.patch_size_voxels),
            ("data.spacing_mm", self.data.spacing_mm),
        ):
            if values is not None and len(values) not in (1, dims):
                raise ValueError(f"{where} has {len(values)} values; a {dims}-dimensional model needs 1 or {dims}")
        if self.data.task == "classification" and self.model.type != "densenet":
            raise ValueError(f"data.task is 'classification' but model.type {self.model.type!r} segments; use densenet")
        if self.data.task == "segmentation" and self.model.type == "densenet":
            raise ValueError(
                "data.task is 'segmentation' but model.type 'densenet' classifies; use unet3d or another segmenter"
            )
        return self

    @property
    def spatial_dims(self) -> int:
        """Dimensions of network and patches."""
        return {"unet2d": 2, "unet3d": 3}.get(self.model.type, self.model.spatial_dims or self.data.spatial_dims)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch edge lengths in voxels, one per axis."""
        size = self.training.patch_size_voxels
        return size if len(size) > 1 else size * self.spatial_dims

    @property
    def config_hash(self) -> str:
        """SHA-256 of everything that influences the result; name, tags, paths and output are left out."""
        relevant = self.model_dump_json(
            exclude={
                "name": True,
                "description": True,
                "tags": True,
                "output": True,
                "data": {"directory": True, "hospitals": {"__all__": {"directory", "site_config"}}, "cache": True},
                "federation": {"pool": True, "num_actors": True, "baselines": True},
            }
        )
        return hashlib.sha256(relevant.encode()).hexdigest()


def rename_aliases(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a raw configuration with the REST and SDK names turned into ours."""
    renamed = {SECTION_ALIASES.get(key, key): value for key, value in raw.items()}
    for section, aliases in FIELD_ALIASES.items():
        if isinstance(renamed.get(section), dict):
            renamed[section] = {aliases.get(key, key): value for key, value in renamed[section].items()}
    federation = renamed.get("federation")
    if "fl_config" in raw and isinstance(federation, dict):
        moved = {k: v for k, v in federation.items() if k in TrainingConfig.model_fields}
        renamed["federation"] = {k: v for k, v in federation.items() if k not in moved}
        renamed["training"] = {**moved, **(renamed.get("training") or {})}
    return renamed
