"""The aggregation section of a run: how updates become new weights, and what a hospital keeps for itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medfl_ray.config.base import HospitalId, Positive, PositiveFloat, Section
from medfl_ray.config.strategies import STRATEGIES, StrategyTraits

StrategyName = Literal[
    "fedavg",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fednova",
    "qfedavg",
    "afl",
    "fedprox",
    "scaffold",
    "feddyn",
    "fedbn",
    "silobn",
    "fedper",
    "fedrep",
    "ditto",
    "apfl",
    "flower",
    "custom",
]
"""The names of the schema; medfl_ray/config/strategies.py has a row of traits for each."""

UnitInterval = Annotated[float, Field(ge=0, le=1)]


class RobustConfig(Section):
    """How updates are combined where some hospitals may be hostile or broken (aggregation.mode: robust)."""

    rule: Literal[
        "norm_bound",
        "median",
        "trimmed_mean",
        "geometric_median",
        "krum",
        "multi_krum",
        "centered_clipping",
    ] = Field("norm_bound", description="Rule; norm_bound shortens every update to the median of the updates' norms.")
    num_hostile: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Hospitals f that may be hostile; a fifth of the updates of a round when absent, but one at least "
        "of three and more.",
    )
    norm_factor: PositiveFloat = Field(1.0, description="norm_bound: the bound as a multiple of the median norm.")
    clipping_radius: PositiveFloat | None = Field(
        None, description="centered_clipping: radius around the last aggregate; the median distance when absent."
    )
    iterations: Positive = Field(10, description="geometric_median, centered_clipping: most iterations.")


class FlowerConfig(Section):
    """A Flower strategy as the aggregation (aggregation.strategy: flower)."""

    strategy: Annotated[str, Field(pattern=r"^\w+$|^[\w.]+:\w+$")] = Field(
        "FedAvg", description="A class of flwr.serverapp.strategy by its name, or your own as 'module:Class'."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the class, by name.")


ON_DATA = ("label_flip", "scaled_backdoor")
ON_UPDATES = ("sign_flip", "gaussian", "alie", "ipm", "scaled_backdoor")
DEFAULT_SCALE = {"sign_flip": 10.0, "gaussian": 1.0, "alie": 1.5, "ipm": 10.0}
"""Strength of an attack without a scale; scaled_backdoor takes what replaces the mean by its own model."""


class AttackConfig(Section):
    """Hospitals that attack, for a study of robustness on data that are not private."""

    kind: Literal["label_flip", "sign_flip", "gaussian", "alie", "ipm", "scaled_backdoor"] = Field(
        description="label_flip and scaled_backdoor train on altered data; the others alter the update."
    )
    hospitals: Annotated[tuple[HospitalId, ...], Field(min_length=1)] = Field(description="Who attacks.")
    scale: PositiveFloat | None = Field(
        None,
        description="Strength: factor of sign_flip (10 when absent), ipm (10) and scaled_backdoor (all weight by the "
        "attackers' weight), deviation of gaussian (1), z of alie (1.5).",
    )

    @field_validator("hospitals")
    @classmethod
    def _names_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("attack.hospitals names a hospital twice")
        return names

    @model_validator(mode="after")
    def _scale_has_a_use(self) -> Self:
        if self.kind == "label_flip" and self.scale is not None:
            raise ValueError("attack.scale does nothing with kind 'label_flip'; leave it out")
        return self

    @property
    def alters_data(self) -> bool:
        """Whether the attackers train on altered images or labels."""
        return self.kind in ON_DATA

    @property
    def alters_updates(self) -> bool:
        """Whether the attackers send something else than what they trained."""
        return self.kind in ON_UPDATES

    @property
    def words(self) -> str:
        """Who attacks and how, for receipts, reports and cards."""
        scale = self.scale if self.scale is not None else DEFAULT_SCALE.get(self.kind)
        strength = "" if scale is None else f", scale {scale:g}"
        return f"{', '.join(sorted(self.hospitals))} ({self.kind}{strength})"


class AggregationConfig(Section):
    """How updates become new weights."""

    strategy: StrategyName = Field("fedavg", description="Federated strategy; docs/strategies.md says what each does.")
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None,
        description="With strategy 'custom': 'module:function', called with this section; it returns a Strategy, as in "
        "medfl_ray/aggregation/strategies.py.",
    )
    mode: Literal["plain", "robust"] = Field(
        "plain", description="'plain' takes the weighted mean of the updates, 'robust' the rule of section robust."
    )
    weighting: Literal["patients", "cases", "uniform"] = Field(
        "patients",
        description="Weight of a hospital: its public num_patients, its public num_cases (num_patients where the "
        "policy declares none), or one.",
    )
    server_learning_rate: PositiveFloat = Field(
        1.0, description="Factor on the mean update; step size of fedadam, fedyogi and fedadagrad."
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="Momentum of fedavgm; beta1 of fedadam and fedyogi."
    )
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="beta2 of fedadam and fedyogi.")
    server_adaptivity: PositiveFloat = Field(
        1e-3, description="tau of the adaptive strategies: updates well below it are not scaled up to full steps."
    )
    bias_correction: Literal["adam", "none", "flower"] = Field(
        "adam",
        description="fedadam, fedyogi: 'adam' corrects both moments for their start at zero, 'none' neither, as Reddi "
        "et al. 2021, and 'flower' scales the step as Flower does.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay of the moving average of the weights that is evaluated and released; 0 switches it off."
    )
    proximal_mu: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Pull of a hospital's weights to the round's: mu of FedProx, with any strategy; 0.01 with fedprox "
        "when absent.",
    )
    fairness: Annotated[float, Field(ge=0)] = Field(
        1.0, description="q of qfedavg: 0 is fedavg, larger values care more for the worst hospital."
    )
    fairness_rate: PositiveFloat = Field(0.1, description="Step size of afl's weights of the hospitals.")
    dynamic_alpha: PositiveFloat = Field(0.01, description="alpha of feddyn.")
    local_parameters: tuple[str, ...] = Field(
        (),
        description="Parameters that stay in the hospital, as patterns of their names ('*.norm*', 'model.2.*'); with "
        "fedbn, silobn, fedper and fedrep what the strategy names when absent.",
    )
    head_steps: Positive | None = Field(
        None, description="fedrep: steps for the hospital's own part before the shared one; half when absent."
    )
    personal_mu: PositiveFloat = Field(
        0.1, description="ditto: pull of the hospital's own model to the shared one (lambda of the paper)."
    )
    personal_share: UnitInterval = Field(
        0.5, description="apfl: share alpha of the hospital's own model in its mixture."
    )
    max_update_norm: PositiveFloat | None = Field(
        None, description="Longest update: shortened to it at the hospital, and refused beyond it on arrival."
    )
    robust: RobustConfig = Field(default_factory=RobustConfig, description="Rule of mode robust.")
    flower: FlowerConfig = Field(default_factory=FlowerConfig, description="Strategy of strategy flower.")

    @model_validator(mode="before")
    @classmethod
    def _afl_weighs_by_itself(cls, raw: Any) -> Any:
        traits = STRATEGIES.get(str(raw.get("strategy"))) if isinstance(raw, dict) else None
        return {"weighting": "uniform", **raw} if traits is not None and traits.finds_weights else raw

    @model_validator(mode="after")
    def _afl_has_uniform_weights(self) -> Self:
        if self.traits.finds_weights and self.weighting != "uniform":
            raise ValueError(
                f"aggregation.strategy {self.strategy!r} finds the hospitals' weights; leave aggregation.weighting out"
            )
        return self

    @model_validator(mode="after")
    def _factory_belongs_to_custom(self) -> Self:
        if self.traits.from_factory != (self.factory is not None):
            raise ValueError("aggregation.strategy 'custom' and aggregation.factory belong together; set both or none")
        return self

    @model_validator(mode="after")
    def _robust_goes_with(self) -> Self:
        if self.mode == "robust" and not self.traits.robust_ok:
            raise ValueError(
                f"aggregation.mode 'robust' does not go with strategy {self.strategy!r}, whose sums are not of updates "
                "alone; use fedavg, fedprox, a server optimizer, or a strategy that keeps parameters in the hospital"
            )
        return self

    @property
    def traits(self) -> StrategyTraits:
        """What the strategy is and may be combined with."""
        return STRATEGIES[self.strategy]

    @property
    def needs_every_update(self) -> bool:
        """Whether the coordinator needs each update on its own, and not their sum."""
        return self.mode == "robust" or not self.traits.sum_suffices

    @property
    def is_stateful(self) -> bool:
        """Whether every hospital remembers something from round to round."""
        return self.traits.stateful

    @property
    def is_personal(self) -> bool:
        """Whether every hospital has a model of its own."""
        return self.traits.personal

    @property
    def mu(self) -> float:
        """FedProx's pull of every hospital's weights to the round's, 0 without one."""
        return self.proximal_mu if self.proximal_mu is not None else self.traits.proximal_mu
