"""The one schema of a run: YAML at the edge, frozen objects inside.

Every field's sentence becomes a row of the reference page. Other accepted names: see `rename_aliases`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from medfl_ray.config_aggregation import AggregationConfig, AttackConfig
from medfl_ray.config_base import Declared, Fraction, HospitalId, Positive, PositiveFloat, Section, one_to_many
from medfl_ray.config_data import DataConfig, HospitalConfig, PartitionConfig, PhantomConfig
from medfl_ray.config_evaluation import EvaluationConfig
from medfl_ray.config_federation import FederationConfig
from medfl_ray.config_fit import (
    attack_problem,
    client_algo_problem,
    hospital_level_problem,
    rule_problem,
    study_problem,
)
from medfl_ray.config_output import OutputConfig
from medfl_ray.config_privacy import PrivacyConfig
from medfl_ray.config_strategies import strategy_problem


class ModelConfig(Section):
    """Which network is trained."""

    type: Literal[
        "unet3d",
        "unet2d",
        "basic_unet",
        "segresnet",
        "dynunet",
        "attention_unet",
        "unetr",
        "swin_unetr",
        "densenet",
        "custom",
        "bundle",
    ] = Field(
        "unet3d",
        description="Name in the model catalogue, 'custom' for a network of your own, or 'bundle' for MONAI's.",
    )
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None,
        description="With type 'custom': 'module:function', called with spatial_dims, in_channels and out_channels; "
        "it returns a torch.nn.Module.",
    )
    network: dict[str, Any] | None = Field(
        None,
        description="With type 'bundle': definition of the network; model.bundle, the folder of a MONAI bundle in a "
        "run's file, fills it.",
    )
    size_divisor: Positive = Field(
        1, description="With types 'custom' and 'bundle': what every input edge is a multiple of."
    )
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

    @model_validator(mode="after")
    def _factory_belongs_to_custom(self) -> Self:
        if (self.type == "custom") != (self.factory is not None):
            raise ValueError("model.type 'custom' and model.factory belong together; set both or neither")
        if (self.type == "bundle") != (self.network is not None):
            raise ValueError(
                "model.type 'bundle' needs the folder of a MONAI bundle as model.bundle in the run's file, or its "
                "definition as model.network; other types take neither"
            )
        return self


class TrainingConfig(Section):
    """How one hospital trains."""

    batch_size: Positive = Field(4, description="Patients per step (expected number under DP).")
    patient_order: Literal["shuffled", "listed"] = Field(
        "shuffled", description="Without DP: a new order in every pass, or the data's own, each pass ending short."
    )
    learning_rate: PositiveFloat = Field(1e-2, description="Learning rate of the local optimizer.")
    lr_schedule: Literal["constant", "cosine", "linear", "step"] = Field(
        "constant", description="How the learning rate falls over the rounds."
    )
    lr_step_rounds: Positive = Field(10, description="lr_schedule: step: rounds between two steps.")
    lr_step_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="lr_schedule: step: factor on the learning rate at each step."
    )
    lr_warmup_rounds: Annotated[int, Field(ge=0)] = Field(
        0, description="First rounds in which the learning rate climbs to that of its schedule, in equal parts."
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="Local optimizer; its state lives for one round."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of sgd, beta1 of adam and adamw.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay of the local optimizer.")
    initial_weights: Path | None = Field(
        None, description="File of public weights to start from, as medfl-ray pretrain writes it; costs no epsilon."
    )
    initial_weights_sha256: str | None = Field(
        None, description="SHA-256 of that file, written into the run's own configuration and checked on resume."
    )
    loss: Literal["dice_ce", "dice", "cross_entropy", "focal"] = Field(
        "dice_ce", description="Loss; computed within one patient."
    )
    patch_size_voxels: Annotated[tuple[Positive, ...], BeforeValidator(one_to_many)] = Field(
        (32, 32, 32), description="Patch edge lengths in voxels, per axis."
    )
    patches_per_patient: Positive = Field(
        1, description="Patches K whose gradients are averaged into one patient gradient."
    )
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.67, description="Share of patches centred on a labelled voxel."
    )
    augment: bool = Field(True, description="Random flips, scaling and noise on the patches.")
    trainable: Literal["all", "last", "norm", "low_rank"] = Field(
        "all",
        description="What is trained: everything, the last layer, normalisation and small layers, or these and a "
        "low-rank part of the others.",
    )
    low_rank: Positive = Field(2, description="Rank of the trained part of each larger layer, for trainable: low_rank.")
    mixed_precision: bool = Field(
        False, description="bfloat16 autocast in forward and backward; norms and noise stay float64."
    )
    patient_gradients: Literal["auto", "single", "grouped"] = Field(
        "auto", description="Under DP: patient by patient, several as convolution groups, or whichever is faster here."
    )
    patient_group_size: Positive | None = Field(
        None, description="Patients in one pass under DP, 1 for patient by patient; measured at start when absent."
    )
    hospitals_per_group: Positive | None = Field(
        None,
        description="In a simulation: hospitals trained at once as convolution groups, 1 for one after the other; "
        "measured at start when absent, and written into the run's own configuration.",
    )
    measured_group_sizes: dict[HospitalId, Positive] = Field(
        default_factory=dict,
        description="What each hospital measured; the run writes it into its own configuration and reuses it.",
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
    client_algo: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None,
        description="'module:function', called with a hospital's name; it returns a monai.fl.client.ClientAlgo that "
        "trains in our trainer's place.",
    )


__all__ = [
    "AggregationConfig",
    "AttackConfig",
    "DataConfig",
    "Declared",
    "EvaluationConfig",
    "FederationConfig",
    "Fraction",
    "HospitalConfig",
    "HospitalId",
    "ModelConfig",
    "OutputConfig",
    "PartitionConfig",
    "PhantomConfig",
    "Positive",
    "PositiveFloat",
    "PrivacyConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
]

"""Strategies that need nothing of a hospital but its change of the weights."""
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
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Figures and studies.")
    attack: AttackConfig | None = Field(None, description="Hospitals that attack, for studies of robustness.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="Results.")

    @model_validator(mode="before")
    @classmethod
    def _rename_aliases(cls, raw: Any) -> Any:
        return uniform_for_hospital_level(rename_aliases(raw)) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _dimensions_agree(self) -> Self:
        dims = self.spatial_dims
        for where, values in (
            ("training.patch_size_voxels", self.training.patch_size_voxels),
            ("data.spacing_mm", self.data.spacing_mm),
        ):
            if values is not None and len(values) not in (1, dims):
                raise ValueError(f"{where} has {len(values)} values; a {dims}-dimensional model needs 1 or {dims}")
        if self.data.task == "classification" and self.model.type not in ("densenet", "custom", "bundle"):
            raise ValueError(f"data.task is 'classification' but model.type {self.model.type!r} segments; use densenet")
        if self.data.task == "segmentation" and self.model.type == "densenet":
            raise ValueError(
                "data.task is 'segmentation' but model.type 'densenet' classifies; use unet3d or another segmenter"
            )
        return self

    @model_validator(mode="after")
    def _studies_fit(self) -> Self:
        problem = study_problem(
            self.evaluation, self.federation, self.privacy, self.aggregation, self.attack, self.data.task
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _client_algo_fits(self) -> Self:
        if self.training.client_algo is not None:
            problem = client_algo_problem(self.data, self.federation, self.privacy, self.aggregation.strategy)
            if problem is not None:
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _hospital_level_fits(self) -> Self:
        if self.privacy.central:
            problem = hospital_level_problem(self.aggregation, self.federation, self.privacy)
            if problem is not None:
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        problem = strategy_problem(self.aggregation, self.federation, self.privacy, self.training.optimizer)
        problem = problem or attack_problem(self.attack, self.federation, self.privacy)
        problem = problem or rule_problem(self.aggregation, self.federation)
        if problem is not None:
            raise ValueError(problem)
        return self

    @property
    def needs_every_update(self) -> bool:
        """Whether the coordinator needs each update on its own: for a rule over them, or for a study of attacks."""
        return self.aggregation.needs_every_update or (self.attack is not None and self.attack.alters_updates)

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
        """SHA-256 of everything that influences the result; name, tags, paths, output and defaults are left out."""
        relevant = self.model_dump_json(
            exclude_defaults=True,
            exclude={
                "name": True,
                "description": True,
                "tags": True,
                "output": True,
                "evaluation": True,
                "data": {"directory": True, "hospitals": {"__all__": {"directory", "site_config"}}, "cache": True},
                "training": {"initial_weights": True, "measured_group_sizes": True, "hospitals_per_group": True},
                "federation": {"pool": True, "num_actors": True, "placement": True, "baselines": True},
            },
        )
        return hashlib.sha256(relevant.encode()).hexdigest()


def uniform_for_hospital_level(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the raw configuration with uniform weights where hospital-level DP asks for them and none are named."""
    privacy, aggregation = raw.get("privacy"), raw.get("aggregation") or {}
    central = isinstance(privacy, dict) and privacy.get("unit") == "hospital"
    if not central or not isinstance(aggregation, dict) or "weighting" in aggregation:
        return raw
    return {**raw, "aggregation": {**aggregation, "weighting": "uniform"}}


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
