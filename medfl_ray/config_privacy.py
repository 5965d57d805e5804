"""The privacy section of a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medfl_ray.config_base import Fraction, PositiveFloat, Section


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
