"""Which strategy goes with what: where a combination would be unsound, or would do nothing, the reason."""

from __future__ import annotations

from medfl_ray.config.aggregation import PARTIAL, PERSONAL, AggregationConfig
from medfl_ray.config.federation import FederationConfig
from medfl_ray.config.privacy import PrivacyConfig

LOSSES = ("qfedavg", "afl")
"""Strategies that send a loss of the hospital's patients."""
DRIFT = ("scaffold", "feddyn")
"""Strategies of which server and hospitals remember two sides of one sum."""
OF_THEIR_ROUND = (*DRIFT, *LOSSES)
"""Strategies whose updates only fit the round that asked for them."""
HOSPITAL_LEVEL = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "custom")


def strategy_problem(
    aggregation: AggregationConfig, federation: FederationConfig, privacy: PrivacyConfig, optimizer: str
) -> str | None:
    """Return why a run's strategy does not go with its other sections, or None where it does."""
    return (
        _settings_problem(aggregation)
        or _optimizer_problem(aggregation, optimizer)
        or _federation_problem(aggregation.strategy, federation)
        or _privacy_problem(aggregation.strategy, privacy)
    )


def _settings_problem(aggregation: AggregationConfig) -> str | None:
    strategy = aggregation.strategy
    if aggregation.local_parameters and strategy not in PARTIAL:
        return (
            f"aggregation.local_parameters does not go with strategy {strategy!r}; use {', '.join(PARTIAL)}, which "
            "keep parameters in the hospital"
        )
    if aggregation.head_steps is not None and strategy != "fedrep":
        return "aggregation.head_steps belongs to strategy 'fedrep'; leave it out"
    if aggregation.proximal_mu and strategy in DRIFT:
        return (
            f"aggregation.proximal_mu does not go with strategy {strategy!r}, which has a correction of its own that "
            "assumes no other pull; leave it out"
        )
    return None


def _optimizer_problem(aggregation: AggregationConfig, optimizer: str) -> str | None:
    if aggregation.strategy in ("scaffold", "fednova") and optimizer != "sgd":
        return (
            f"aggregation.strategy {aggregation.strategy!r} counts how far a unit of gradient has led, which "
            f"{optimizer} does not say; set training.optimizer: sgd, with momentum if you like"
        )
    return None


def _federation_problem(strategy: str, federation: FederationConfig) -> str | None:
    if federation.stragglers == "keep" and strategy in OF_THEIR_ROUND:
        return (
            f"federation.stragglers: keep does not go with aggregation.strategy {strategy!r}, whose updates only fit "
            "the round that asked for them; set stragglers: drop"
        )
    if federation.keep == "best" and strategy in PERSONAL:
        return (
            f"federation.keep: best does not go with aggregation.strategy {strategy!r}, with which every hospital goes "
            "on with a model of its own from the last round; leave it out"
        )
    if federation.over_selection and strategy in DRIFT:
        return (
            f"federation.over_selection does not go with aggregation.strategy {strategy!r}: a hospital that was not "
            "needed would remember a round that the server does not know of; leave it out"
        )
    return None


def _privacy_problem(strategy: str, privacy: PrivacyConfig) -> str | None:
    if privacy.enable_dp and strategy in LOSSES:
        return (
            f"aggregation.strategy {strategy!r} sends the loss of a hospital's patients, which no noise covers; switch "
            "privacy.enable_dp off, or use another strategy"
        )
    if privacy.hospital_dp and strategy not in HOSPITAL_LEVEL:
        return (
            f"aggregation.strategy {strategy!r} does not go with privacy.unit: hospital, which noises the change of "
            "the weights alone and knows no hospital from round to round; use fedavg, a server optimizer or fedprox"
        )
    return None
