"""One row of the privacy ledger: an event, never an epsilon, bound to the row before it and signed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medfl_ray.errors import LedgerError
from medfl_ray.privacy.accountant import Charge, Segment, TreeSegment
from medfl_ray.store.hash_chain import digest_of, link_problem
from medfl_ray.store.signing_key import SigningKey, signature_is_valid

CHAIN_LABEL = "medfl-ray privacy ledger v1"
CHARGE_FIELDS = (
    "job",
    "round",
    "attempt",
    "noise_multiplier",
    "sample_rate",
    "num_steps",
    "max_grad_norm",
    "num_patients",
    "delta",
    "unit",
    "adjacency",
)
"""What a charge consists of, whenever and by whichever ledger it is written down."""
KINDS = ("reserve", "settle", "release", "recover", "unprotected")
CHARGED_AGAIN = "charged again: "
"""Begins the reason of a charge that recovery has copied from a mirror; see `reservation_states`."""
SEALS = ("hash", "signature")


class LedgerHead(NamedTuple):
    """The last row of an account: what a mirror or a receipt remembers of the ledger; sequence 0 when empty."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        """One word, as receipts hold it."""
        return f"{self.sequence}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> LedgerHead:
        """Read the word back.

        Raises:
          LedgerError: the text is not of the form sequence:hash.
        """
        sequence, _, digest = text.partition(":")
        if not sequence.isdecimal() or len(digest) != 64:
            raise LedgerError(f"{text!r} is not the head of a ledger; expected a number, a colon and 64 hex digits")
        return cls(int(sequence), digest)


@dataclass(frozen=True, kw_only=True)
class LedgerEvent:
    """A row. `reserve` opens a charge under the id `reservation`; `settle` and `release` name it in `closes`.

    `recover` writes down that the history of a mirror was charged again; its reason holds the mirror's head.
    `unprotected` writes down that a job used the data without patient-level differential privacy, with the reason.
    `fingerprint` is None in every new row: a hash of what a data set holds tells whether a patient was added.
    """

    hospital: str
    data_set: str
    sequence: int
    kind: str
    at: str
    previous_hash: str
    job: str | None = None
    round: int | None = None
    attempt: int | None = None
    reservation: str | None = None
    closes: str | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    num_steps: int | None = None
    max_grad_norm: float | None = None
    num_patients: int | None = None
    delta: float | None = None
    unit: str | None = None
    adjacency: str | None = None
    fingerprint: str | None = None
    reason: str | None = None
    hash: str = ""
    signature: str = ""

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> LedgerEvent:
        """Read a row of the table or of an export.

        Raises:
          LedgerError: the row has other fields than an event, or a value of another type.
        """
        fields = {name: value for name, value in row.items() if name != "id"}
        if fields.keys() != TYPES.keys():
            raise LedgerError(f"a row of the ledger has the fields {sorted(fields)}; expected {sorted(TYPES)}")
        wrong = [name for name, value in fields.items() if type(value) not in TYPES[name]]
        if wrong:
            raise LedgerError(f"a row of the ledger has a value of another type in the fields {sorted(wrong)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return dict(vars(self))  # the fields are plain values, which dataclasses.asdict would copy one by one

    def sealed(self, key: SigningKey) -> LedgerEvent:
        """Return the row with its hash and the hospital's signature."""
        digest = self.digest()
        return dataclasses.replace(self, hash=digest, signature=key.sign(digest))

    def digest(self) -> str:
        """SHA-256 over every other field, the hash of the row before included."""
        return digest_of(CHAIN_LABEL, {name: value for name, value in self.to_dict().items() if name not in SEALS})

    @property
    def head(self) -> LedgerHead:
        """The row as the head of the ledger that ends with it."""
        return LedgerHead(self.sequence, self.hash)

    @property
    def segment(self) -> Charge:
        """What a reservation charges."""
        assert self.noise_multiplier is not None
        assert self.sample_rate is not None
        assert self.num_steps is not None
        return charge_of(self.adjacency, self.noise_multiplier, self.sample_rate, self.num_steps)


def _types_of(annotation: str) -> tuple[type, ...]:
    named = {"str": (str,), "int": (int,), "float": (float, int), "None": (type(None),)}
    return tuple(kind for part in annotation.split(" | ") for kind in named[part])


TYPES = {field.name: _types_of(str(field.type)) for field in dataclasses.fields(LedgerEvent)}


def charge_of(adjacency: str | None, noise_multiplier: float, sample_rate: float, num_steps: int) -> Charge:
    """Return what the accountant is to charge; the one mechanism that is accounted under zero-out is a tree."""
    if adjacency == "zero_out":
        return TreeSegment(noise_multiplier, num_steps)
    return Segment(noise_multiplier, sample_rate, num_steps)


def labels_of(events: Iterable[LedgerEvent]) -> dict[str, str]:
    """Return the unit of an account's epsilon, and its adjacency: the weaker one where a tree is among the charges."""
    charged = charges(events)
    units = sorted({event.unit for event in charged if event.unit}) or ["patient"]
    trees = any(event.adjacency == "zero_out" for event in charged)
    return {"unit": units[0], "adjacency": "zero_out" if trees else "add_remove"}


def genesis(hospital: str, data_set: str) -> LedgerHead:
    """Return the head of an account without rows; two accounts never share one."""
    text = json.dumps([CHAIN_LABEL, hospital, data_set])
    return LedgerHead(0, hashlib.sha256(text.encode()).hexdigest())


def charged_segments(events: Iterable[LedgerEvent], job: str | None = None) -> tuple[Charge, ...]:
    """Return what has been reserved and not released, of one job or of all."""
    return tuple(event.segment for event in charges(events) if job in (None, event.job))


def charges(events: Iterable[LedgerEvent]) -> tuple[LedgerEvent, ...]:
    """Return the reservations that have not been released."""
    charged: dict[str, LedgerEvent] = {}
    for event in events:
        if event.kind == "reserve" and event.reservation is not None:
            charged[event.reservation] = event
        elif event.kind == "release" and event.closes is not None:
            charged.pop(event.closes, None)
    return tuple(charged.values())


def unprotected_jobs(events: Iterable[LedgerEvent]) -> dict[str, str]:
    """Return the jobs that used the data without patient-level differential privacy, and the reason of each."""
    return {event.job or "": event.reason or "" for event in events if event.kind == "unprotected"}


def check_chain(
    account: tuple[str, str], known: Sequence[LedgerEvent], added: Iterable[LedgerEvent], public_key: str
) -> None:
    """Check that added rows follow the known ones without a gap, unaltered, signed and consistent.

    Raises:
      LedgerError: names the first row that is wrong, and in what.
    """
    head = known[-1].head if known else genesis(*account)
    check_rows(account, head, reservation_states(known), added, public_key)


def reservation_states(events: Iterable[LedgerEvent]) -> dict[str, str]:
    """Return what became of each reservation of a checked history: reserved, again, settle or release.

    `again` is a charge that recovery has copied from a mirror: what it stands for was trained, perhaps, on another
    disk, and so it is never released.
    """
    states: dict[str, str] = {}
    for event in events:
        _state_problem(event, states)
    return states


def check_rows(
    account: tuple[str, str],
    previous: LedgerHead,
    states: dict[str, str],
    added: Iterable[LedgerEvent],
    public_key: str,
) -> None:
    """Check that rows follow a head, as `check_chain` does, and bring the states of the reservations up to date.

    Raises:
      LedgerError: names the first row that is wrong, and in what.
    """
    for event in added:
        problem = _row_problem(event, previous, account, public_key) or _state_problem(event, states)
        if problem:
            raise LedgerError(
                f"row {previous.sequence + 1} of the privacy ledger of hospital {account[0]!r}, data set "
                f"{account[1]!r}, is bad: {problem}. Nothing trains on this data set until the ledger is "
                "restored; see `medfl-ray privacy ledger recover`."
            )
        previous = event.head


def hashes_link(account: tuple[str, str], events: Iterable[LedgerEvent]) -> bool:
    """Say whether rows follow each other from the first and are unaltered, whoever signed them."""
    previous = genesis(*account)
    for event in events:
        if (event.sequence, event.previous_hash, event.digest()) != (previous.sequence + 1, previous.hash, event.hash):
            return False
        previous = event.head
    return True


def holds(events: Sequence[LedgerEvent], head: LedgerHead) -> bool:
    """Say whether a history has a head among its rows, or has charged the history of that head again."""
    if head.sequence == 0 or any(event.kind == "recover" and event.reason == str(head) for event in events):
        return True
    return len(events) >= head.sequence and events[head.sequence - 1].hash == head.hash


def is_genuine(event: LedgerEvent, public_key: str) -> bool:
    """Say whether a row, seen alone, is unaltered and signed by the hospital."""
    return event.digest() == event.hash and signature_is_valid(public_key, event.hash, event.signature)


def _row_problem(event: LedgerEvent, previous: LedgerHead, account: tuple[str, str], public_key: str) -> str | None:
    if (event.hospital, event.data_set) != account:
        return "it belongs to another account"
    return link_problem(event, previous.sequence, previous.hash, public_key, "the hospital's")


def _state_problem(event: LedgerEvent, states: dict[str, str]) -> str | None:
    """Follow the reservations; a row that was signed and hashed can still contradict an earlier one."""
    if event.kind == "reserve":
        return _reserve_problem(event, states)
    if event.kind in ("settle", "release"):
        state = states.get(event.closes or "")
        if state == "again" and event.kind == "release":
            return "it gives back what recovery has charged again"
        if event.closes is None or state not in ("reserved", "again"):
            return "it closes a reservation that is not open"
        states[event.closes] = event.kind
    elif event.kind == "unprotected" and not (event.job and event.reason):
        return "it does not say which job used the data without protection, and why"
    elif event.kind not in KINDS:
        return f"its kind {event.kind!r} is unknown to this version of medfl-ray"
    return None


def _reserve_problem(event: LedgerEvent, states: dict[str, str]) -> str | None:
    if event.reservation is None or event.reservation in states:
        return "its reservation exists already"
    if None in (event.noise_multiplier, event.sample_rate, event.num_steps):
        return "it does not say what it charges"
    if event.adjacency == "zero_out" and event.unit != "hospital":
        return "it charges patients as if they were a tree over hospitals, which costs less"
    states[event.reservation] = "again" if (event.reason or "").startswith(CHARGED_AGAIN) else "reserved"
    return None
