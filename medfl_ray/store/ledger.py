"""A hospital's privacy ledger: what was ever charged to one data set, over all runs and restarts.

The order is reserve, train, settle. A crash anywhere leaves the reservation charged; only a release,
where provably nothing left the host, gives it back. See privacy/README.md for the reasons.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from medfl_ray.errors import BudgetExceeded, LedgerError, PrivacyConfigError
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import LedgerRows, Mechanism, PrivacySpent, Unit
from medfl_ray.privacy.accountant import Charge, check_charge, check_delta, epsilon_spent
from medfl_ray.store.ledger_events import (
    CHARGE_FIELDS,
    LedgerEvent,
    LedgerHead,
    charge_of,
    charged_segments,
    charges,
    check_chain,
    genesis,
    holds,
    labels_of,
)
from medfl_ray.store.ledger_export import EXPORT_FORMAT
from medfl_ray.store.ledger_file import LedgerFile


class PrivacyLedger:
    """The account of one (hospital, data set); nothing else, a file count or a fingerprint, is part of its key."""

    def __init__(
        self,
        file: LedgerFile,
        account: tuple[str, str],
        delta: float,
        max_epsilon: float | None,
        one_run: bool = False,
        max_steps: int | None = None,
        unit: Unit = "patient",
    ) -> None:
        """See `open`."""
        check_delta(delta)
        if max_epsilon is not None and not max_epsilon > 0:
            raise PrivacyConfigError(f"max_epsilon is {max_epsilon!r}; it must be a number above 0")
        self._file = file
        self._account = account
        self._delta = delta
        self._max_epsilon = max_epsilon
        self._one_run = one_run
        self._max_steps = max_steps
        self._unit = unit
        self._rows: list[LedgerEvent] = []

    @classmethod
    def open(
        cls,
        path: Path,
        hospital: str,
        data_set: str,
        delta: float,
        max_epsilon: float | None,
        expected_heads: Sequence[LedgerHead] = (),
        one_run: bool = False,
        max_steps: int | None = None,
        unit: Unit = "patient",
    ) -> PrivacyLedger:
        """Open or create the ledger file and check every row of the account.

        Args:
          path: the file in the hospital's state folder; the hospital's key lies beside it.
          delta: of the account's epsilon, in (0, 1).
          max_epsilon: lifetime budget of the data set, in its own unit; None for no limit.
          expected_heads: the last rows that a mirror or receipt has seen; the ledger must hold each.
          one_run: nobody has declared a budget, so that only the first run that was charged may go on.
          max_steps: lifetime number of private steps on the data set; None for no limit.
          unit: what the account's epsilon protects; nothing else is ever charged to it.

        Raises:
          LedgerError: the ledger is damaged, altered, locked, or lacks the expected head.
        """
        ledger = cls(LedgerFile(Path(path)), (hospital, data_set), delta, max_epsilon, one_run, max_steps, unit)
        ledger.verify()
        for head in expected_heads:
            ledger.check_holds(head)
        return ledger

    def reserve(
        self,
        job: str,
        round: int,
        attempt: int,
        mechanism: Mechanism,
        budget: float | None,
        fingerprint: str | None = None,
    ) -> str:
        """Charge a mechanism before anything is trained and return the reservation's id.

        Args:
          budget: what this job alone may spend, as epsilon at the mechanism's delta.
          fingerprint: HMAC of the data set's contents, recorded as evidence; see SigningKey.fingerprint.

        Raises:
          BudgetExceeded: the job's or the data set's epsilon would pass its budget; nothing was charged.
          LedgerError: this job, round and attempt is charged already, or the ledger cannot be written.
        """
        figures = (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.num_steps)
        segment = charge_of(mechanism.adjacency, *figures)
        check_charge(segment)
        terms = f"{mechanism.unit}-level, {mechanism.adjacency.replace('_', '/')} adjacency"
        # Accounted once outside the lock, so that under it the answer is usually known already.
        self._refuse_over_budget(job, segment, mechanism.delta, budget, terms)
        reservation = secrets.token_hex(16)
        with self._appending("reserve") as append:
            self._refuse_other_unit(mechanism)
            self._refuse_twice(job, round, attempt)
            self._refuse_second_run(job)
            self._refuse_more_steps(mechanism.num_steps)
            self._refuse_over_budget(job, segment, mechanism.delta, budget, terms)
            append(
                job=job,
                round=round,
                attempt=attempt,
                reservation=reservation,
                fingerprint=fingerprint,
                **mechanism.model_dump(),
            )
        return reservation

    def settle(self, reservation: str) -> None:
        """Write down that a reservation is being used up; from here on it cannot be released.

        Raises:
          LedgerError: no such reservation is open, or the ledger cannot be written.
        """
        self._close("settle", reservation, None)

    def release(self, reservation: str, reason: str) -> None:
        """Give a reservation back; only for what provably never left the host, with the reason why.

        Raises:
          LedgerError: no such reservation is open, or the ledger cannot be written.
        """
        self._close("release", reservation, reason)

    def spent(self) -> PrivacySpent:
        """Return the epsilon of everything charged so far, reservations included.

        Raises:
          LedgerError: the ledger cannot be read or was altered.
        """
        self._refresh()
        epsilon = epsilon_spent(charged_segments(self._rows), self._delta)
        figures = {"epsilon": epsilon, "delta": self._delta, "budget": self._max_epsilon}
        return PrivacySpent.model_validate({**figures, "ledger_head": str(self._head), **labels_of(self._rows)})

    def events(self) -> tuple[LedgerEvent, ...]:
        """Return every row of the account, in order."""
        self._refresh()
        return tuple(self._rows)

    def head(self) -> LedgerHead:
        """Return the last row's number and hash, for a mirror or a receipt."""
        self._refresh()
        return self._head

    def verify(self) -> LedgerHead:
        """Check the file and every row from the first: order, hashes, signatures, reservations; return the head.

        Raises:
          LedgerError: names the first bad row.
        """
        self._file.check_integrity()
        self._rows = []
        return self.head()

    def check_holds(self, expected: LedgerHead) -> None:
        """Refuse to go on where the ledger lacks a row that a mirror or receipt has seen.

        Raises:
          LedgerError: the ledger is shorter than the expected head, or another history.
        """
        rows = self.events()
        if holds(rows, expected):
            return
        if len(rows) < expected.sequence:
            seen = f"has {len(rows)} rows and is known to have had {expected.sequence}: its end is missing"
        else:
            seen = f"differs from its mirror at row {expected.sequence}: it is another history"
        raise LedgerError(
            f"the privacy ledger of hospital {self._account[0]!r}, data set {self._account[1]!r}, {seen}. Nothing "
            "trains on this data set until `medfl-ray privacy ledger recover` has charged the mirrored history."
        )

    def check_heads(self, heads: Mapping[str, str]) -> None:
        """Refuse to go on where the ledger lacks the row that the coordinator has seen of this hospital.

        Raises:
          LedgerError: the ledger is shorter than the row named for this hospital, or another history.
        """
        head = heads.get(self._account[0])
        if head is not None and not holds(self._rows, LedgerHead.parse(head)):
            self.check_holds(LedgerHead.parse(head))

    def rows_after(self, heads: Mapping[str, str]) -> tuple[LedgerRows, ...]:
        """Return the rows read or written so far behind the one named for this hospital.

        All of them where the named row is of a history that was charged again: a mirror then starts anew.
        """
        hospital, data_set = self._account
        head = LedgerHead.parse(heads[hospital]) if hospital in heads else genesis(*self._account)
        follows = 0 < head.sequence <= len(self._rows) and self._rows[head.sequence - 1].hash == head.hash
        events = tuple(row.to_dict() for row in (self._rows[head.sequence :] if follows else self._rows))
        key = self._file.key.public_key
        return (LedgerRows(hospital=hospital, data_set=data_set, public_key=key, events=events),)

    def export(self) -> dict[str, Any]:
        """Return the account as plain data: its rows, what they cost, and with what key they are signed."""
        spent = self.spent()
        return {
            "format": EXPORT_FORMAT,
            "hospital": self._account[0],
            "data_set": self._account[1],
            "spent": spent.model_dump(),
            "unit": spent.unit,
            "adjacency": spent.adjacency,
            "delta": spent.delta,
            "public_key": self._file.key.public_key,
            "head": str(self._head),
            "events": [row.to_dict() for row in self._rows],
        }

    def append_mirrored(self, rows: Sequence[LedgerEvent]) -> None:
        """Append rows that this hospital wrote and signed before, exactly as a mirror kept them; for recovery.

        Raises:
          LedgerError: the rows do not follow this ledger's end, or were not signed by this hospital.
        """
        with self._file.writing() as connection:
            self._load(connection)
            check_chain(self._account, self._rows, rows, self._file.key.public_key)
            for row in rows:
                self._file.append(connection, row)
            failpoint("ledger.recover.mirrored")
        self._rows += rows

    def charge_again(self, charges: Sequence[LedgerEvent], mirror: LedgerHead) -> None:
        """Charge reservations of a history that this ledger lost, and write down which; for recovery.

        Afterwards the mirror's head counts as held.

        Raises:
          LedgerError: the ledger cannot be written.
        """
        with self._appending("recover") as append:
            for lost in charges:
                why = f"charged again: row {lost.sequence} of the mirror {mirror}"
                fields = {name: getattr(lost, name) for name in CHARGE_FIELDS}
                fields |= {"reservation": secrets.token_hex(16), "reason": why}
                append("reserve", **fields)
            append(reason=str(mirror))

    @property
    def _head(self) -> LedgerHead:
        return self._rows[-1].head if self._rows else genesis(*self._account)

    def _close(self, kind: str, reservation: str, reason: str | None) -> None:
        with self._appending(kind) as append:
            opened = next((row for row in self._rows if row.reservation == reservation), None)
            closed = next((row for row in self._rows if row.closes == reservation), None)
            if opened is None:
                raise LedgerError(f"cannot {kind} reservation {reservation!r}: this data set's ledger has no such one")
            if closed is not None:
                raise LedgerError(
                    f"cannot {kind} the reservation of job {opened.job!r}, round {opened.round}, attempt "
                    f"{opened.attempt}: row {closed.sequence} has closed it ({closed.kind}); reserve again"
                )
            append(job=opened.job, round=opened.round, attempt=opened.attempt, closes=reservation, reason=reason)

    @contextmanager
    def _appending(self, kind: str) -> Iterator[Callable[..., None]]:
        """Hold the write lock, bring the rows up to date, and offer to append one; durable when the block ends."""
        failpoint(f"ledger.{kind}.begin")
        with self._file.writing() as connection:
            self._load(connection)

            def append(as_kind: str = kind, **fields: Any) -> None:
                row = self._next_row(as_kind, fields, pending[-1].head if pending else self._head)
                self._file.append(connection, row)
                failpoint(f"ledger.{kind}.appended")
                pending.append(row)

            pending: list[LedgerEvent] = []
            yield append
            failpoint(f"ledger.{kind}.before_commit")
        self._rows += pending
        failpoint(f"ledger.{kind}.committed")

    def _next_row(self, kind: str, fields: dict[str, Any], head: LedgerHead) -> LedgerEvent:
        hospital, data_set = self._account
        return LedgerEvent(
            hospital=hospital,
            data_set=data_set,
            sequence=head.sequence + 1,
            kind=kind,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            previous_hash=head.hash,
            **fields,
        ).sealed(self._file.key)

    def _refresh(self) -> None:
        with self._file.reading() as connection:
            self._load(connection)

    def _load(self, connection: Connection) -> None:
        """Read and check what was added since the last look; another process may have been the writer."""
        after = max(self._head.sequence - 1, 0)  # the last known row is read again: it must still be the same
        rows = self._file.rows(connection, self._account, after)
        if self._rows and (not rows or rows[0] != self._rows[-1]):
            raise LedgerError(
                f"the privacy ledger of hospital {self._account[0]!r}, data set {self._account[1]!r}, changed behind "
                f"row {after}: rows that were there are gone or altered. See `medfl-ray privacy ledger recover`."
            )
        added = rows[1:] if self._rows else rows
        if added:
            check_chain(self._account, self._rows, added, self._file.key.public_key)
            self._rows += added

    def _refuse_other_unit(self, mechanism: Mechanism) -> None:
        if mechanism.unit == "patient" and mechanism.adjacency == "zero_out":
            raise LedgerError(
                "patients are charged under add/remove adjacency; zero-out is that of a tree over whole hospitals"
            )
        if mechanism.unit != self._unit or (self._rows and labels_of(self._rows)["unit"] != mechanism.unit):
            raise LedgerError(
                f"the ledger of {self._account[0]!r}, data set {self._account[1]!r}, holds charges of another unit "
                f"than {mechanism.unit}; epsilons of patients and hospitals do not add up. Use another state folder"
            )

    def _refuse_twice(self, job: str, round: int, attempt: int) -> None:
        released = {row.closes for row in self._rows if row.kind == "release"}
        for row in self._rows:
            same = row.kind == "reserve" and (row.job, row.round, row.attempt) == (job, round, attempt)
            if same and row.reservation not in released:
                raise LedgerError(
                    f"job {job!r}, round {round}, attempt {attempt} is charged already (row {row.sequence}); "
                    "a retry trains on other noise and is a new charge: use the next attempt number"
                )

    def _refuse_second_run(self, job: str) -> None:
        first = next(iter(charges(self._rows)), None)
        if self._one_run and first is not None and _run_of(first.job or "") != _run_of(job):
            raise BudgetExceeded(
                f"hospital {self._account[0]!r} has private data and nobody has declared a budget for data set "
                f"{self._account[1]!r}, on which run {_run_of(first.job or '')!r} has spent already. Declare "
                "max_epsilon in the site policy, so that the hospital decides how much may be spent in all."
            )

    def _refuse_more_steps(self, num_steps: int) -> None:
        total = num_steps + sum(row.num_steps or 0 for row in charges(self._rows))
        if self._max_steps is not None and total > self._max_steps:
            raise BudgetExceeded(
                f"hospital {self._account[0]!r} allows {self._max_steps} private steps on data set "
                f"{self._account[1]!r} in all; this round would make them {total}. Lower federation.rounds or steps."
            )

    def _refuse_over_budget(self, job: str, segment: Charge, delta: float, budget: float | None, terms: str) -> None:
        accounts = (("hospital", None, self._delta, self._max_epsilon), ("job", job, delta, budget))
        for whose, of_job, its_delta, limit in accounts:
            if limit is None:
                continue
            after = epsilon_spent((*charged_segments(self._rows, of_job), segment), its_delta)
            if after > limit:
                subject = f"job {job!r} at hospital" if whose == "job" else "hospital"
                raise BudgetExceeded(
                    f"{subject} {self._account[0]!r} would reach epsilon={_up(after)} on data set "
                    f"{self._account[1]!r}; its budget is {limit:g} ({terms}, "
                    f"delta={its_delta:g}). Raise privacy.noise_multiplier or lower federation.rounds."
                )


def _run_of(job: str) -> str:
    """Return the run that a job belongs to: its baselines are charged as <run>/local and <run>/central."""
    return job.split("/", maxsplit=1)[0]


def _up(epsilon: float) -> str:
    """Print an epsilon rounded up, so that it never reads as within the budget it exceeds."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}" if math.isfinite(epsilon) else "infinity"
