"""A hospital's privacy ledger: what was ever charged to one data set, over all runs and restarts.

The order is reserve, train, settle. A crash anywhere leaves the reservation charged; only a release,
where provably nothing left the host, gives it back. See privacy/README.md for the reasons.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from medfl_ray.errors import LedgerError
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import LedgerRows, Mechanism, PrivacySpent, PrivacyUnit
from medfl_ray.privacy.accountant import check_charge, epsilon_spent
from medfl_ray.round_times import Clock, exact_now, stamp
from medfl_ray.store.ledger.budgets import AccountTerms, ChargeRequest, check_budgets, check_charged, check_request
from medfl_ray.store.ledger.events import (
    CHARGE_FIELDS,
    CHARGED_AGAIN,
    LedgerEvent,
    LedgerHead,
    charged_segments,
    check_chain,
    genesis,
    holds,
    labels_of,
    unprotected_jobs,
)
from medfl_ray.store.ledger.export import EXPORT_FORMAT
from medfl_ray.store.ledger.file import LedgerFile


class PrivacyLedger:
    """The account of one (hospital, data set); nothing else, a file count or a fingerprint, is part of its key."""

    def __init__(
        self, file: LedgerFile, account: tuple[str, str], terms: AccountTerms, clock: Clock = exact_now
    ) -> None:
        """See `open`."""
        self._file = file
        self._account = account
        self._terms = terms
        self._clock = clock
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
        unit: PrivacyUnit = "patient",
        allow_unprotected: bool = False,
        clock: Clock = exact_now,
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
          allow_unprotected: the hospital goes on charging an account whose epsilon is infinite already, for which its
            lifetime budget no longer says anything.
          clock: gives the time that stands in a row.

        Raises:
          LedgerError: the ledger is damaged, altered, locked, or lacks the expected head.
        """
        terms = AccountTerms(
            delta=delta,
            max_epsilon=max_epsilon,
            one_run=one_run,
            max_steps=max_steps,
            unit=unit,
            allow_unprotected=allow_unprotected,
        )
        ledger = cls(LedgerFile(Path(path)), (hospital, data_set), terms, clock)
        ledger.verify()
        for head in expected_heads:
            ledger.check_holds(head)
        return ledger

    def reserve(self, job: str, round: int, attempt: int, mechanism: Mechanism, budget: float | None) -> str:
        """Charge a mechanism before anything is trained and return the reservation's id.

        Args:
          budget: what the job may spend, as epsilon at the mechanism's delta. A run's own job counts alone; what is
            trained beside it, `RUN/anything`, counts together.

        Raises:
          BudgetExceeded: the job's or the data set's epsilon would pass its budget, or is infinite; nothing is charged.
          LedgerError: this job, round and attempt is charged already, or the ledger cannot be written.
        """
        wanted = ChargeRequest(job=job, round=round, attempt=attempt, mechanism=mechanism, budget=budget)
        check_charge(wanted.segment)
        # Accounted once outside the lock, so that under it the answer is usually known already.
        check_budgets(self._terms, self._account, self._rows, wanted)
        reservation = secrets.token_hex(16)
        with self._appending("reserve") as append:
            check_request(self._terms, self._account, self._rows, wanted)
            append(job=job, round=round, attempt=attempt, reservation=reservation, **mechanism.model_dump())
        return reservation

    def settle(self, reservation: str, mechanism: Mechanism | None = None) -> None:
        """Write down that a reservation is being used up; from here on it cannot be released.

        Args:
          mechanism: what is about to be trained; it has to be what was charged.

        Raises:
          LedgerError: no such reservation is open, another mechanism was charged, or the ledger cannot be written.
        """
        self._close("settle", reservation, None, mechanism)

    def release(self, reservation: str, reason: str) -> None:
        """Give a reservation back; only for what provably never left the host, with the reason why.

        Raises:
          LedgerError: no such reservation is open, or the ledger cannot be written.
        """
        self._close("release", reservation, reason)

    def mark_unprotected(self, job: str, reason: str) -> None:
        """Write down, once per job, that it uses the data without patient-level differential privacy.

        From then on the account's epsilon is infinite, whatever else is charged to it.

        Raises:
          LedgerError: the job has no name or no reason, or the ledger cannot be written.
        """
        if not job or not reason:
            raise LedgerError("an unprotected use of a data set is written down with a job and a reason")
        with self._appending("unprotected") as append:
            if job not in unprotected_jobs(self._rows):
                append(job=job, reason=reason)

    def has_charges(self) -> bool:
        """Say whether the account holds any row beside those of unprotected jobs.

        Raises:
          LedgerError: the ledger cannot be read or was altered.
        """
        return any(row.kind != "unprotected" for row in self.events())

    def is_unprotected(self) -> bool:
        """Say whether any job has used the data without patient-level differential privacy.

        Raises:
          LedgerError: the ledger cannot be read or was altered.
        """
        return bool(unprotected_jobs(self.events()))

    def spent(self) -> PrivacySpent:
        """Return the epsilon of everything charged so far, reservations included; infinite once unprotected.

        Raises:
          LedgerError: the ledger cannot be read or was altered.
        """
        self._refresh()
        delta = self._terms.delta
        exposed = bool(unprotected_jobs(self._rows))
        epsilon = math.inf if exposed else epsilon_spent(charged_segments(self._rows), delta)
        figures = {"epsilon": epsilon, "delta": delta, "budget": self._terms.max_epsilon}
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
            "spent": spent.to_json(),
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

    def charge_again(
        self, charges: Sequence[LedgerEvent], mirror: LedgerHead, unprotected: Mapping[str, str] | None = None
    ) -> None:
        """Charge reservations of a history that this ledger lost, and write down which; for recovery.

        Afterwards the mirror's head counts as held.

        Args:
          unprotected: jobs of that history which used the data without protection, and why.

        Raises:
          LedgerError: the ledger cannot be written.
        """
        with self._appending("recover") as append:
            for lost in charges:
                why = f"{CHARGED_AGAIN}row {lost.sequence} of the mirror {mirror}"
                fields = {name: getattr(lost, name) for name in CHARGE_FIELDS}
                append("reserve", **fields, reservation=secrets.token_hex(16), reason=why)
            for job, reason in (unprotected or {}).items():
                if job not in unprotected_jobs(self._rows):
                    append("unprotected", job=job, reason=reason)
            append(reason=str(mirror))

    @property
    def _head(self) -> LedgerHead:
        return self._rows[-1].head if self._rows else genesis(*self._account)

    def _close(self, kind: str, reservation: str, reason: str | None, mechanism: Mechanism | None = None) -> None:
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
            if kind == "release" and (opened.reason or "").startswith(CHARGED_AGAIN):
                raise LedgerError(
                    f"cannot release the reservation of job {opened.job!r}, round {opened.round}: recovery has charged "
                    "it again for what was trained elsewhere, and it stays charged"
                )
            if mechanism is not None:
                check_charged(opened, mechanism)
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
            at=stamp(self._clock()),
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
