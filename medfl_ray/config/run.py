"""The one schema of a run: YAML at the edge, frozen objects inside.

Every field's sentence becomes a row of the reference page. Other accepted names: see `rename_aliases`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from medfl_ray.config.aggregation import AggregationConfig, AttackConfig
from medfl_ray.config.base import Section
from medfl_ray.config.compatibility import (
    attack_problem,
    client_algo_problem,
    hospital_level_problem,
    rule_problem,
    strategy_problem,
    study_problem,
)
from medfl_ray.config.data import DataConfig
from medfl_ray.config.evaluation import EvaluationConfig
from medfl_ray.config.federation import FederationConfig
from medfl_ray.config.model import ModelConfig
from medfl_ray.config.output import OutputConfig
from medfl_ray.config.privacy import PrivacyConfig
from medfl_ray.config.training import TrainingConfig

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
            problem = client_algo_problem(self.data, self.federation, self.privacy, self.aggregation)
            if problem is not None:
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _hospital_level_fits(self) -> Self:
        if self.privacy.hospital_dp:
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
    by_hospital = isinstance(privacy, dict) and privacy.get("unit") == "hospital"
    if not by_hospital or not isinstance(aggregation, dict) or "weighting" in aggregation:
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
