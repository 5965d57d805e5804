"""What the federation needs of the outside: pools of hospitals, ledgers and a place to keep a run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.fixed_point import PartialSum
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    HospitalInfo,
    LedgerRows,
    Mechanism,
    Metric,
    PrivacySpent,
    RoundPlan,
    RoundResult,
    SiteEvaluation,
)
from medfl_ray.params import Vector
from medfl_ray.study_records import SavedResult


@dataclass(frozen=True)
class AlonePlan:
    """A baseline: rounds of training without any exchange, on the plan of each round in turn.

    `evaluates` asks for held-out metrics after every round and not after the last alone.
    """

    rounds: tuple[RoundPlan, ...]
    returns_weights: bool = False
    evaluates: bool = False


@dataclass(frozen=True, eq=False)
class AloneResult:
    """What a baseline leaves: held-out metrics, and the weights where the plan asked for them.

    `patient_scores` are of data that may be shown; `curve` has the metrics per evaluated round, the last among them.
    """

    hospital: str
    metrics: dict[str, Metric]
    spent: PrivacySpent | None
    weights: Vector | None = None
    patient_scores: tuple[float, ...] | None = None
    curve: Mapping[int, dict[str, Metric]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedHospital:
    """What is known of one hospital whose update was added to others' where it was trained."""

    hospital: str
    num_steps: int
    metrics: dict[str, Metric]
    spent: PrivacySpent | None = None


@dataclass(frozen=True, eq=False)
class SummedUpdates:
    """Updates of several hospitals of one process, added up there; `total` does not depend on their order.

    `seconds` is where the process's time went, by name.
    """

    round: int
    attempt: int
    layout_checksum: str
    total: PartialSum
    trained: tuple[TrainedHospital, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


TrainingAnswer = ClientUpdate | SummedUpdates | ClientFailure
"""What training yields: an update or a failure of one hospital, or a sum over several."""


class Signer(Protocol):
    """A signing key; see medfl_ray/store/signing_key.py."""

    @property
    def public_key(self) -> str:
        """The public half as 64 hex digits."""

    def sign(self, digest: str) -> str:
        """Return the signature of a hash in hex."""


SignatureCheck = Callable[[str, str, str], bool]
"""Says whether the owner of a public key signed a digest: (public key, digest, signature)."""


class Ledger(Protocol):
    """One hospital's privacy account of one data set; see medfl_ray/store/ledger/account.py."""

    def reserve(self, job: str, round: int, attempt: int, mechanism: Mechanism, budget: float | None) -> str:
        """Charge the worst case in advance; BudgetExceeded where it would not fit."""

    def settle(self, reservation: str, mechanism: Mechanism | None = None) -> None:
        """Mark a reservation as used; LedgerError where what is to be trained is not what was charged."""

    def release(self, reservation: str, reason: str) -> None:
        """Give a reservation back, only where provably nothing left the host."""

    def spent(self) -> PrivacySpent:
        """Everything reserved or settled so far."""

    def export(self) -> dict[str, Any]:
        """The account's events as plain data."""

    def mark_unprotected(self, job: str, reason: str) -> None:
        """Write down, once per job, that something leaves without protection: the epsilon is infinite from then on."""

    def has_charges(self) -> bool:
        """Whether the account holds any row of a run with differential privacy."""

    def check_heads(self, heads: Mapping[str, str]) -> None:
        """LedgerError where the account lacks the row that the mapping names for its hospital."""

    def rows_after(self, heads: Mapping[str, str]) -> tuple[LedgerRows, ...]:
        """What was written behind the row that the mapping names for the hospital."""


class Memory(Protocol):
    """What one hospital remembers from round to round of a run; see medfl_ray/store/run/hospital_memory.py."""

    def before(self, round: int) -> Mapping[str, Vector]:
        """What it knew before a round, by name; nothing before its first."""

    def save(self, round: int, memory: Mapping[str, Vector]) -> None:
        """Keep durably what it knows after a round."""

    def forget_from(self, round: int) -> None:
        """Forget what an earlier attempt at a round, or at a later one, has left."""


class LedgerKeeper(Protocol):
    """The coordinator's mirror of the hospitals' ledgers; see medfl_ray/store/run/mirror.py."""

    def heads(self, hospitals: Sequence[str]) -> dict[str, str]:
        """The last row seen of each hospital's ledger; nothing of a hospital that has shown none."""

    def pin(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Pin the key of each hospital's ledger at first contact; per hospital that shows another key, the reason."""

    def keep(self, rows: Iterable[LedgerRows]) -> dict[str, str]:
        """Keep new rows durably; per hospital whose rows do not follow those kept, the reason."""


class ClientPool(Protocol):
    """The hospitals of a run, wherever they are. A failure is a value, never an exception."""

    def describe(self) -> Sequence[HospitalInfo | ClientFailure]:
        """Start every hospital and return what each says of itself."""

    def reserve(self, plan: RoundPlan) -> Mapping[str, PrivacySpent | ClientFailure | None]:
        """Reserve the round's privacy cost at each hospital of the plan; None where DP is off. The deadline begins."""

    def release(self, plan: RoundPlan, hospitals: Sequence[str], reason: str) -> None:
        """Give back reservations of hospitals that never started to train."""

    def train(
        self, plan: RoundPlan, hospitals: Sequence[str], weights: Vector
    ) -> Generator[TrainingAnswer, None, None]:
        """Yield answers in the order in which they arrive, until the plan's deadline; every hospital is in one.

        Between them may come updates of an earlier round that missed its deadline. Closing the generator early
        waits for nobody.
        """

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        """Yield each hospital's held-out evaluation of the weights, until the deadline; every hospital is in one."""

    def train_alone(self, plans: Mapping[str, AlonePlan], weights: Vector) -> Iterator[AloneResult | ClientFailure]:
        """Run a baseline at each hospital named, from the given weights."""

    def export_ledgers(self) -> dict[str, dict[str, Any]]:
        """Return each hospital's ledger export, empty where DP is off."""

    def close(self) -> None:
        """End every process that this pool started."""


@dataclass(frozen=True, eq=False)
class FederationState:
    """All that a run must not lose between rounds; `round` is the last one published, 0 before the first."""

    round: int
    weights: Vector
    server_state: Mapping[str, npt.NDArray[np.float32]]


class StudyStore(Protocol):
    """Where finished pieces are kept, so that a resumed run repeats, and charges, none; see saved_studies.py."""

    def load(self, name: str) -> SavedResult | None:
        """Return a piece, or None where it is not there or does not read whole."""

    def save(self, name: str, piece: SavedResult) -> None:
        """Keep a piece durably."""


class PublishedRound(Protocol):
    """The part of a checkpoint from which a run goes on; a `FederationState` or the store's own object."""

    @property
    def round(self) -> int: ...
    @property
    def weights(self) -> Vector: ...
    @property
    def server_state(self) -> Mapping[str, npt.NDArray[np.float32]]: ...


class RoundStore(Protocol):
    """Where a run's checkpoints, receipts and metrics are kept; see medfl_ray/store/run/folder.py.

    A round is opened, collects, is aggregated and then published by its checkpoint, or abandoned when it is recorded
    without one. Whatever state a crash leaves it in is durable.
    """

    def open_round(self, plan: RoundPlan) -> None:
        """Note the plan before anything is reserved; a plan that names no hospital keeps a cohort secret."""

    def start_collecting(self, plan: RoundPlan) -> None:
        """Note that hospitals are being asked to train."""

    def note_delivered(self, plan: RoundPlan, hospitals: Sequence[str]) -> None:
        """Note whose updates are in the sum; each hospital's once."""

    def note_aggregated(self, plan: RoundPlan, weights_after: str) -> None:
        """Note the checksum of the weights that the round has led to."""

    def save_checkpoint(self, state: FederationState, result: RoundResult) -> None:
        """Make the state durable; only after this are the new weights released."""

    def record(self, result: RoundResult) -> None:
        """Append a closed round to metrics and receipts, published or not."""
