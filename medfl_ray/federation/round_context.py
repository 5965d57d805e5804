"""What a round works with and does not change: everything that stays the same over the rounds of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medfl_ray import params
from medfl_ray.aggregation.strategies import ServerState, Strategy
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.run import RunConfig
from medfl_ray.federation.events import Event, HospitalState
from medfl_ray.federation.hospital_level import HospitalLevel
from medfl_ray.federation.ports import ClientPool, LedgerKeeper, RoundStore, SignatureCheck
from medfl_ray.messages import Mechanism, PrivacySpent

Select = Callable[[int, Sequence[str]], tuple[str, ...]]
"""Names who trains: (round, hospitals that may be asked) -> hospitals."""


Combine = Callable[[Updates, ServerState, params.Vector], tuple[params.Vector, ServerState]]
"""A rule over all updates: (updates, server's state, weights) -> (what takes the mean's place, own state)."""


@dataclass(frozen=True)
class RoundContext:
    """What stays the same over the rounds of a run; `hospital_dp` is there under hospital-level differential privacy.

    `aggregation_weights` are the hospitals' public weights in the mean, `keys` the public keys of those that sign their
    updates. `evaluated` are the hospitals that are asked to score the weights, and `select` names who trains in a
    round. `combine` is there where a rule needs every update, and not their sum alone.
    """

    run: RunConfig
    job: str
    attempt: int
    layout: params.Layout
    strategy: Strategy
    pool: ClientPool
    store: RoundStore
    mirror: LedgerKeeper
    available: tuple[str, ...]
    num_steps: Mapping[str, int]
    aggregation_weights: Mapping[str, int]
    mechanisms: Mapping[str, Mechanism]
    keys: Mapping[str, str]
    is_signed: SignatureCheck
    emit: Callable[[Event], None]
    evaluated: tuple[str, ...]
    select: Select
    hospital_dp: HospitalLevel | None = None
    combine: Combine | None = None

    @property
    def secret_cohorts(self) -> bool:
        """Whether nobody but the coordinator may learn who was asked."""
        return self.hospital_dp is not None and self.hospital_dp.secret_cohorts

    def tell(self, state: HospitalState) -> None:
        """Say what a hospital of the cohort is doing, unless the cohort is secret."""
        if not self.secret_cohorts:
            self.emit(state)


def foreign_rows(sender: str, spent: PrivacySpent | None, members: Sequence[str] = ()) -> str | None:
    """Say why ledger rows of an answer are not taken: they name another hospital's account; None where none does.

    Args:
      sender: the hospital that answered.
      members: those whose data it pools, where it is the central baseline.
    """
    own = {sender, *members}
    others = sorted({rows.hospital for rows in (spent.ledger_rows if spent is not None else ())} - own)
    if not others:
        return None
    return f"its answer holds rows of the ledger of {', '.join(others)}; a hospital writes into its own account alone"
