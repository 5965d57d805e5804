"""Every strategy as one row of traits: what it is, and what it may be combined with.

The server's function of a strategy is in medfl_ray/aggregation/strategies.py, what a hospital does for it in
medfl_ray/training/rules/client_rules.py. CONTRIBUTING.md says how one is added.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StrategyTraits:
    """What a strategy is and what it may be combined with.

    An allow-list: a name that ends in `_ok`, and `sum_suffices`, permits something and is False until somebody has
    shown that it is sound. The other traits permit nothing.

    Args:
      stateful: every hospital remembers something from round to round.
      personal: every hospital has a model of its own, in part or as a whole.
      partial: some parameters stay in the hospital.
      head_first: the hospital's own part is trained before the shared one.
      sends_loss: an update contains a loss of the hospital's patients, which no noise covers.
      drift_corrected: server and hospitals remember two sides of one sum.
      needs_sgd: an update is divided by the steps of plain SGD, with or without momentum.
      tied_to_its_round: an update only fits the round that asked for it.
      finds_weights: the strategy finds the hospitals' weights by itself.
      from_factory: the server's function is the user's own.
      rule_from_outside: a rule that the starting process brings takes the place of the mean.
      proximal_mu: the pull to the round's weights where the configuration names none.
      sum_suffices: the server works on the sum of the updates and never needs one of them by itself.
      patient_dp_ok: whatever leaves a hospital is made of noised steps, of what the server sent and of public numbers.
      hospital_level_dp_ok: the server reads the noised mean change of the weights alone and knows no hospital.
      robust_ok: the mean may be replaced by a robust rule, because every value of an update is a change of a weight.
      client_algo_ok: a hospital may be a MONAI ClientAlgo, which answers with weights and nothing else.
      coalitions_ok: the strategy can train a part of the federation without what it remembers of the whole.
    """

    stateful: bool = False
    personal: bool = False
    partial: bool = False
    head_first: bool = False
    sends_loss: bool = False
    drift_corrected: bool = False
    needs_sgd: bool = False
    tied_to_its_round: bool = False
    finds_weights: bool = False
    from_factory: bool = False
    rule_from_outside: bool = False
    proximal_mu: float = 0.0
    sum_suffices: bool = False
    patient_dp_ok: bool = False
    hospital_level_dp_ok: bool = False
    robust_ok: bool = False
    client_algo_ok: bool = False
    coalitions_ok: bool = False


_SERVER_OPTIMIZER = StrategyTraits(
    sum_suffices=True,
    patient_dp_ok=True,
    hospital_level_dp_ok=True,
    robust_ok=True,
    client_algo_ok=True,
    coalitions_ok=True,
)
"""Plain training in the hospital; what differs is what the server makes of the mean change of the weights."""
_PARTIALLY_SHARED = StrategyTraits(
    stateful=True, personal=True, partial=True, sum_suffices=True, patient_dp_ok=True, robust_ok=True
)
_OWN_MODEL = StrategyTraits(stateful=True, personal=True, sum_suffices=True, patient_dp_ok=True, robust_ok=True)

STRATEGIES: dict[str, StrategyTraits] = {
    "fedavg": _SERVER_OPTIMIZER,
    "fedavgm": _SERVER_OPTIMIZER,
    "fedadam": _SERVER_OPTIMIZER,
    "fedyogi": _SERVER_OPTIMIZER,
    "fedadagrad": _SERVER_OPTIMIZER,
    "fednova": StrategyTraits(needs_sgd=True, sum_suffices=True, patient_dp_ok=True, coalitions_ok=True),
    "qfedavg": StrategyTraits(sends_loss=True, tied_to_its_round=True, sum_suffices=True, coalitions_ok=True),
    "afl": StrategyTraits(sends_loss=True, tied_to_its_round=True, finds_weights=True, sum_suffices=True),
    "fedprox": StrategyTraits(
        proximal_mu=0.01,
        sum_suffices=True,
        patient_dp_ok=True,
        hospital_level_dp_ok=True,
        robust_ok=True,
        coalitions_ok=True,
    ),
    "scaffold": StrategyTraits(
        stateful=True,
        drift_corrected=True,
        needs_sgd=True,
        tied_to_its_round=True,
        sum_suffices=True,
        patient_dp_ok=True,
    ),
    "feddyn": StrategyTraits(
        stateful=True,
        drift_corrected=True,
        tied_to_its_round=True,
        sum_suffices=True,
        patient_dp_ok=True,
        robust_ok=True,
    ),
    "fedbn": _PARTIALLY_SHARED,
    "silobn": _PARTIALLY_SHARED,
    "fedper": _PARTIALLY_SHARED,
    "fedrep": StrategyTraits(
        stateful=True,
        personal=True,
        partial=True,
        head_first=True,
        sum_suffices=True,
        patient_dp_ok=True,
        robust_ok=True,
    ),
    "ditto": _OWN_MODEL,
    "apfl": _OWN_MODEL,
    "flower": StrategyTraits(rule_from_outside=True, patient_dp_ok=True, client_algo_ok=True),
    "custom": StrategyTraits(
        from_factory=True,
        sum_suffices=True,
        patient_dp_ok=True,
        hospital_level_dp_ok=True,
        robust_ok=True,
        client_algo_ok=True,
        coalitions_ok=True,
    ),
}


def strategies_with(trait: str) -> str:
    """Return the names of the strategies that have a trait, for a message."""
    return ", ".join(name for name, traits in STRATEGIES.items() if getattr(traits, trait))
