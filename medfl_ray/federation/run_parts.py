"""What a run is built from, where it is kept, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.events import Event
from medfl_ray.federation.ports import (
    ClientPool,
    Ledger,
    LedgerKeeper,
    PublishedRound,
    RoundStore,
    SignatureCheck,
    StudyStore,
)
from medfl_ray.federation.round_context import Combine, Select
from medfl_ray.federation.studies.coalitions import TrainCoalitions
from medfl_ray.messages import (
    ClientFailure,
    HospitalInfo,
    Message,
    Receipt,
    RoundResult,
    SiteEvaluation,
)
from medfl_ray.params import Layout, Vector


class RunStore(RoundStore, Protocol):
    """A keeper that also resumes a run and takes its last results."""

    @property
    def problems(self) -> Sequence[str]:
        """What was found damaged on the way, one sentence each."""

    def next_attempt(self) -> int:
        """Return a number that no earlier attempt of this run has used, durably."""

    def receipts(self) -> list[Receipt]:
        """Return the receipts of the rounds kept so far, in order."""

    def results(self) -> list[RoundResult]:
        """Return the closed rounds kept so far, in order."""

    @property
    def saved(self) -> StudyStore:
        """Where finished baselines and studies are kept."""

    def best(self) -> PublishedRound | None:
        """Return the checkpoint with the best mean score over hospitals, or None where none may show one."""

    def save_record(self, name: str, record: Message) -> None:
        """Write a record into a JSON file of the run."""

    def resume(self) -> PublishedRound | None:
        """Return the last good checkpoint, or None for a new run."""

    def save_hospitals(self, infos: Sequence[HospitalInfo], failures: Sequence[ClientFailure]) -> None:
        """Write who is present, and who is not and why, before the first round."""

    def save_group_sizes(self, sizes: Mapping[str, int], hospitals_per_group: int | None) -> None:
        """Write into the run's configuration what was measured: patients at once per hospital, hospitals at once."""

    def save_final(
        self,
        weights: Vector,
        layout: Layout,
        evaluations: Sequence[SiteEvaluation],
        failures: Sequence[ClientFailure],
    ) -> None:
        """Write the final weights and their evaluation at each hospital."""

    def save_baselines(self, document: Mapping[str, object]) -> None:
        """Write the baselines' figures."""

    def save_ledgers(self, ledgers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write each hospital's ledger export."""


@dataclass(frozen=True)
class RunParts:
    """What a run is built from; `initial_weights` gets channels in and out and returns layout and weights.

    `select` names who is asked in a round, where that is not drawn as the configuration says; `combine` is a rule over
    all updates of a round, where the configuration names none of ours. `train_coalitions` trains several federations of
    fewer hospitals at once, where there is room.
    """

    run: RunConfig
    job: str
    policies: tuple[SitePolicy, ...]
    pool: ClientPool
    store: RunStore
    mirror: LedgerKeeper
    initial_weights: Callable[[int, int], tuple[Layout, Vector]]
    emit: Callable[[Event], None]
    stop: threading.Event
    open_federation_ledger: Callable[[], Ledger]
    is_signed: SignatureCheck
    select: Select | None = None
    combine: Combine | None = None
    train_coalitions: TrainCoalitions | None = None


Ending = Literal["all_rounds", "ended_early", "stopped", "quorum_lost"]
"""all_rounds: every round was published. ended_early: federation.patience ended it. stopped: somebody asked for that.
quorum_lost: too many rounds in a row could not be published."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended; `absent` are hospitals that could not start, or were asked and never delivered an update."""

    rounds_done: int
    ending: Ending
    reason: str
    absent: tuple[str, ...]
    weights_checksum: str

    @property
    def completed(self) -> bool:
        """Whether the run has its final weights; one that is not completed can be resumed."""
        return self.ending in ("all_rounds", "ended_early")
