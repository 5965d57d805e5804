"""A hospital's own policy: what it declares in public and what it allows; it wins over any job."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config.base import DataKind, HospitalId, Positive, PositiveFloat, Section
from medfl_ray.config.files import parse_model, read_yaml
from medfl_ray.config.run import RunConfig


class SitePolicy(Section):
    """The public declarations and limits under which a hospital takes part.

    `num_patients` is a rounded, public number of training patients: sample rate, delta, the normalising
    constant and the aggregation weight derive from it and never from counting files.
    """

    hospital: HospitalId = Field(description="Name of the hospital.")
    data_set: HospitalId = Field(description="Name of the data set; with the hospital's name the key of its budget.")
    declared: DataKind = Field("private", description="What the data are.")
    num_patients: Positive = Field(description="Rounded, public number of training patients.")
    num_cases: Positive | None = Field(
        None, description="Rounded, public number of training cases, for aggregation.weighting: cases."
    )
    max_epsilon: PositiveFloat | None = Field(
        None, description="Lifetime patient-level epsilon budget of the data set."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Delta of the budget; min(1e-5, 1 / (10 N)) when absent."
    )
    min_noise_multiplier: PositiveFloat | None = Field(
        None, description="Noise multiplier below which the hospital does not train."
    )
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip norm above which the hospital does not train.")
    max_steps_per_round: Positive | None = Field(None, description="Largest number of local steps in one round.")
    max_total_steps: Positive | None = Field(
        None, description="Lifetime number of private steps on the data set, over all runs."
    )
    allowed_tasks: tuple[Literal["segmentation", "classification"], ...] | None = Field(
        None, description="Tasks that the hospital takes part in; all when absent."
    )
    require_dp: bool = Field(False, description="Refuse every job without differential privacy.")
    allow_unprotected: bool = Field(
        False,
        description="Train without patient-level differential privacy on private data although a budget is declared or "
        "something was charged; the epsilon of the account is infinite from then on.",
    )

    @property
    def effective_delta(self) -> float:
        """Delta of the hospital's account."""
        return self.delta if self.delta is not None else default_delta(self.num_patients)


def default_delta(num_patients: int) -> float:
    """Return min(1e-5, 1 / (10 num_patients)), the delta of an account by default."""
    return min(1e-5, 1.0 / (10 * num_patients))


def budget_hash(run: RunConfig) -> str:
    """Return the SHA-256 of what decides how much a run may spend: its privacy section and what is declared of data."""
    declared = run.data.model_dump(
        mode="json", include={"name": True, "declared": True, "hospitals": True}, exclude_defaults=True
    )
    for hospital in declared.get("hospitals", ()):
        hospital.pop("directory", None)
        hospital.pop("site_config", None)
    text = json.dumps([run.privacy.model_dump(mode="json", exclude_defaults=True), declared], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class ServerSection(Section):
    """Where the agent connects to."""

    address: str = Field("127.0.0.1:9092", description="Host and port of the federation's server.")
    use_ssl: bool = Field(True, description="Use TLS.")
    certificate_path: Path | None = Field(None, description="Certificate of the server's authority.")
    client_certificate: Path | None = Field(None, description="The hospital's own certificate.")
    client_key: Path | None = Field(None, description="Private key of the hospital's certificate.")


class HospitalSection(Section):
    """Who the hospital is."""

    id: HospitalId = Field(description="Name of the hospital.")
    name: str = Field("", description="Full name, shown in reports.")
    region: str = Field("", description="Region, shown in reports.")


class SiteDataSection(Section):
    """Where the hospital's images are."""

    directory: Path = Field(description="Folder of the hospital's images.")
    format: Literal["auto", "decathlon", "nnunet", "manifest", "dicom"] = Field(
        "auto", description="Layout of the folder."
    )
    labels: dict[int, str] = Field(default_factory=dict, description="Names of the label values above 0.")
    preprocessing: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of data.spacing_mm, intensity and window."
    )
    data_set: HospitalId = Field("dataset", description="Name of the data set in the ledger.")
    declared: DataKind = Field("private", description="What the data are.")


class SiteTrainingSection(Section):
    """The hospital's hardware."""

    device: str = Field("auto", description="Device to train on.")
    batch_size: Positive | None = Field(None, description="Largest physical batch.")
    num_workers: int = Field(0, description="Threads that decode volumes at start.")
    mixed_precision: bool = Field(False, description="Allow bfloat16 in forward and backward.")


class SitePrivacySection(Section):
    """The limits of the hospital."""

    enable_dp: bool = Field(True, description="Refuse every job without differential privacy.")
    epsilon: PositiveFloat | None = Field(None, description="Lifetime patient-level epsilon budget of the data set.")
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="Delta of the budget.")
    min_noise_multiplier: PositiveFloat | None = Field(None, description="Smallest noise multiplier allowed.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Largest clip norm allowed.")
    max_steps_per_round: Positive | None = Field(None, description="Largest number of local steps in one round.")
    max_total_steps: Positive | None = Field(
        None, description="Lifetime number of private steps on the data set, over all runs."
    )
    allowed_tasks: tuple[Literal["segmentation", "classification"], ...] | None = Field(
        None, description="Tasks that the hospital takes part in; all when absent."
    )
    allow_unprotected: bool = Field(
        False,
        description="Train without patient-level differential privacy on private data although a budget is declared or "
        "something was charged; the epsilon of the account is infinite from then on. Needs enable_dp: false.",
    )
    num_patients: Positive = Field(description="Rounded, public number of training patients.")
    num_cases: Positive | None = Field(
        None, description="Rounded, public number of training cases, for aggregation.weighting: cases."
    )

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.enable_dp and self.allow_unprotected:
            raise ValueError(
                "privacy.allow_unprotected and privacy.enable_dp contradict each other: with enable_dp every job "
                "without differential privacy is refused; set enable_dp: false, or leave allow_unprotected out"
            )
        return self


class LoggingSection(Section):
    """The agent's log."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is written.")
    output: Path | None = Field(None, description="Log file; standard error when absent.")


class SiteConfig(Section):
    """hospital_config.yaml."""

    server: ServerSection = Field(default_factory=ServerSection, description="Connection.")
    hospital: HospitalSection = Field(description="Identity.")
    data: SiteDataSection = Field(description="Images.")
    training: SiteTrainingSection = Field(default_factory=SiteTrainingSection, description="Hardware.")
    privacy: SitePrivacySection = Field(description="Policy.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="Log.")

    @property
    def policy(self) -> SitePolicy:
        """The part that wins over any job."""
        return SitePolicy(
            hospital=self.hospital.id,
            data_set=self.data.data_set,
            declared=self.data.declared,
            num_patients=self.privacy.num_patients,
            num_cases=self.privacy.num_cases,
            max_epsilon=self.privacy.epsilon,
            delta=self.privacy.delta,
            min_noise_multiplier=self.privacy.min_noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            max_steps_per_round=self.privacy.max_steps_per_round,
            max_total_steps=self.privacy.max_total_steps,
            allowed_tasks=self.privacy.allowed_tasks,
            require_dp=self.privacy.enable_dp,
            allow_unprotected=self.privacy.allow_unprotected,
        )


def load_site_config(path: Path) -> SiteConfig:
    """Load hospital_config.yaml, in sections or in the older flat form.

    Raises:
      ConfigError: the file is missing, not YAML, or has an unknown key.
    """
    raw = read_yaml(path)
    return parse_model(SiteConfig, _from_flat(raw) if "hospital_id" in raw else raw, path.name)


def _from_flat(raw: dict[str, Any]) -> dict[str, Any]:
    known = {"server_address", "hospital_id", "data_directory", "enable_gpu", "privacy"}
    sections: dict[str, Any] = {key: value for key, value in raw.items() if key not in known}
    sections["hospital"] = {"id": raw["hospital_id"]}
    sections["data"] = {"directory": raw.get("data_directory")}
    if "server_address" in raw:
        sections["server"] = {"address": raw["server_address"]}
    if "enable_gpu" in raw:
        sections["training"] = {"device": "auto" if raw["enable_gpu"] else "cpu"}
    if "privacy" in raw:
        sections["privacy"] = raw["privacy"]
    return sections
