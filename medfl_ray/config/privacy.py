"""The privacy section of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medfl_ray.config.base import Fraction, PositiveFloat, Section


class HospitalLevelConfig(Section):
    """Hospital-level differential privacy: a trusted coordinator clips each hospital's update and noises the sum."""

    mechanism: Literal["gaussian", "tree"] = Field(
        "gaussian",
        description="'gaussian' for cohorts that are sampled in secret (add/remove adjacency), 'tree' for cohorts that "
        "everybody knows (DP-FTRL, zero-out adjacency).",
    )
    clip_norm: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Clip norm C of one hospital's update; the first one where it adapts."
    )
    adaptive_clip: bool = Field(False, description="Let C follow a quantile of the updates' norms (gaussian only).")
    target_quantile: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of hospitals whose update is to fit C."
    )
    clip_learning_rate: PositiveFloat = Field(0.2, description="Learning rate of the steps of log C.")
    count_noise: PositiveFloat | None = Field(
        None,
        description="Noise standard deviation on how many updates fitted C; a twentieth of the expected cohort, or "
        "the noise multiplier where that is larger, when absent.",
    )
    rounds_per_tree: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Rounds until a new tree starts (tree only); all rounds when absent."
    )
    num_hospitals: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Public number of hospitals of the federation; as many as are configured when absent."
    )
    max_epsilon: PositiveFloat | None = Field(
        None, description="Lifetime hospital-level epsilon budget of the federation on this data name."
    )

    @model_validator(mode="after")
    def _fields_of_the_mechanism(self) -> Self:
        if self.mechanism == "tree" and self.adaptive_clip:
            raise ValueError(
                "privacy.hospital_level.adaptive_clip needs mechanism: gaussian, because all rounds of a tree share "
                "one clip norm; set adaptive_clip: false"
            )
        if self.mechanism == "gaussian" and self.rounds_per_tree is not None:
            raise ValueError("privacy.hospital_level.rounds_per_tree belongs to mechanism: tree; leave it out")
        return self


class PrivacyConfig(Section):
    """Differential privacy of patients, or of hospitals as a whole."""

    enable_dp: bool = Field(True, description="Train with DP; off means that the weights may reveal patients.")
    epsilon: PositiveFloat | None = Field(
        None,
        description="Epsilon that the federated run may spend, its baselines and studies apart: patient-level at each "
        "hospital, or hospital-level at the coordinator, by `unit`.",
    )
    extra_epsilon: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Patient-level epsilon that the run's baselines and studies may spend together at each hospital, "
        "beside `epsilon`; when absent none on private data, and on others what max_epsilon leaves.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Delta; min(1e-5, 1 / (10 N)) when absent, with N patients or hospitals by `unit`."
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Clip norm C of one patient's gradient.")
    noise_multiplier: PositiveFloat | None = Field(
        None, description="Noise standard deviation over C; solved from epsilon when absent."
    )
    sample_rate: Fraction | None = Field(None, description="Poisson rate q; batch_size / num_patients when absent.")
    unit: Literal["patient", "hospital"] = Field(
        "patient",
        description="What one differing record is: a patient (noise at each hospital), or a hospital with all its "
        "patients (noise at the coordinator, for large federations).",
    )
    hospital_level: HospitalLevelConfig = Field(
        default_factory=HospitalLevelConfig, description="Clipping and noise at the coordinator, for unit: hospital."
    )
    accountant: Literal["pld"] = Field("pld", description="Accountant; PLD of Google's dp-accounting.")

    @field_validator("accountant", mode="before")
    @classmethod
    def _no_approximation(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in ("gdp", "clt"):
            raise ValueError(
                f"privacy.accountant {value!r} understates epsilon: it approximates by a central limit theorem, "
                "which is no bound; use 'pld'"
            )
        return value

    @model_validator(mode="after")
    def _epsilon_or_sigma(self) -> Self:
        if self.enable_dp and self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "privacy.enable_dp is on, so give privacy.epsilon or privacy.noise_multiplier (or set enable_dp: false)"
            )
        return self

    @model_validator(mode="after")
    def _fields_of_the_unit(self) -> Self:
        if self.unit == "hospital" and not self.enable_dp:
            raise ValueError("privacy.unit is 'hospital' with privacy.enable_dp off; turn it on or leave the unit out")
        if self.unit == "hospital" and self.sample_rate is not None:
            raise ValueError(
                "privacy.sample_rate is the rate of patients; with privacy.unit: hospital the rate of hospitals is "
                "federation.fraction: set that instead"
            )
        if self.unit == "patient" and self.hospital_level != HospitalLevelConfig():
            raise ValueError("privacy.hospital_level has settings but privacy.unit is 'patient'; set unit: hospital")
        return self

    @property
    def patient_level(self) -> bool:
        """Whether each hospital trains with DP-SGD."""
        return self.enable_dp and self.unit == "patient"

    @property
    def hospital_dp(self) -> bool:
        """Whether the coordinator clips and noises: hospital-level differential privacy."""
        return self.enable_dp and self.unit == "hospital"
