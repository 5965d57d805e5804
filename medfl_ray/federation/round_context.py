"""What a round works with: what stays the same over a run, what earlier rounds left, and what has happened so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from medfl_ray import params
from medfl_ray.aggregation.strategies import ServerState, Strategy
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.run import RunConfig
from medfl_ray.federation.events import Event, HospitalState
from medfl_ray.federation.hospital_level import HospitalLevel
from medfl_ray.federation.policies import FailureHistory
from medfl_ray.federation.ports import ClientPool, LedgerKeeper, RoundStore, SignatureCheck
from medfl_ray.messages import ClientFailure, ClientUpdate, LedgerRows, Mechanism, Metric, PrivacySpent, RoundPlan

Select = Callable[[int, Sequence[str]], tuple[str, ...]]
"""Names who trains: (round, hospitals that may be asked) -> hospitals."""


Combine = Callable[[Updates, ServerState, params.Vector], tuple[params.Vector, ServerState]]
"""A rule over all updates: (updates, server's state, weights) -> (what takes the mean's place, own state)."""


@dataclass
class RunHistory:
    """What earlier rounds left: who failed how often, and the plans of updates that missed the last deadline."""

    failure_history: FailureHistory
    late_plans: dict[str, RoundPlan] = field(default_factory=dict)


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
    history: RunHistory
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


@dataclass
class RoundProgress:
    """What has happened in the round so far; `late` are hospitals whose update of an earlier round is in the sum.

    `updates` keeps each of them where a robust rule needs them all. `held` are what attackers of a study trained, until
    what the others sent is known.
    """

    spent: dict[str, PrivacySpent] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    late: dict[str, int] = field(default_factory=dict)
    update_hashes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, Metric]] = field(default_factory=dict)
    ledger_rows: list[LedgerRows] = field(default_factory=list)
    updates: Updates | None = None
    held: dict[str, ClientUpdate] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def time_for(self, pause_s: float, deadline_s: float | None) -> bool:
        """Say whether a pause still fits into the round's deadline."""
        return deadline_s is None or time.monotonic() - self.started + pause_s < deadline_s

    def take_rows(self, spent: PrivacySpent) -> PrivacySpent:
        """Take the ledger's new rows off an answer, so that the mirror alone keeps them."""
        self.ledger_rows.extend(spent.ledger_rows)
        return spent.model_copy(update={"ledger_rows": ()})
