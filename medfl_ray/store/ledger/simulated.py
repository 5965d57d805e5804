"""The accounts of a simulation's hospitals in one file: a round's charges become durable in two writes, not thousands.

Real hospitals keep their own ledgers, each on its own disk. Virtual ones are one process's, and their data made up:
one file with an account for each of them says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError, PrivacyError
from medfl_ray.messages import Mechanism, PrivacySpent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.budgets import AccountTerms
from medfl_ray.store.ledger.file import LEDGER_NAME, LedgerFile


@dataclass(frozen=True)
class Account:
    """What an account is opened with; see `PrivacyLedger.open`."""

    hospital: str
    data_set: str
    delta: float
    max_epsilon: float | None
    max_steps: int | None = None
    allow_unprotected: bool = False

    @property
    def terms(self) -> AccountTerms:
        """What the hospital allows on its data set."""
        return AccountTerms(
            delta=self.delta,
            max_epsilon=self.max_epsilon,
            max_steps=self.max_steps,
            allow_unprotected=self.allow_unprotected,
        )


class SimulatedLedgers:
    """One account for each virtual hospital."""

    def __init__(self, folder: Path, accounts: Callable[[str], Account]) -> None:
        """Open or make the file in `folder`; `accounts` describes a hospital's account when it is first needed.

        Raises:
          LedgerError: the file is damaged, altered or locked, or its folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LedgerError(f"cannot make the folder of the simulation's ledgers: {error.strerror}") from None
        self._file = LedgerFile(folder / LEDGER_NAME)
        self._file.check_integrity()
        self._accounts = accounts
        self._ledgers: dict[str, PrivacyLedger] = {}

    def reserve(
        self, key: tuple[str, int, int], wanted: Mapping[str, Mechanism], budget: float | None, heads: Mapping[str, str]
    ) -> dict[str, str | PrivacyError]:
        """Charge every hospital's mechanism in one write; return each one's reservation, or why it has none.

        Args:
          key: job, round and attempt.
          budget: epsilon that the job alone may spend at one hospital.
          heads: rows that the accounts must hold.

        Raises:
          LedgerError: the file cannot be written; nothing was charged.
        """
        answers: dict[str, str | PrivacyError] = {}

        def charge() -> None:
            for hospital, mechanism in wanted.items():
                try:
                    ledger = self._open(hospital)
                    ledger.check_heads(heads)
                    answers[hospital] = ledger.reserve(*key, mechanism, budget)
                except PrivacyError as error:
                    answers[hospital] = error

        self._durably(charge)
        return answers

    def settle(self, reservations: Mapping[str, str]) -> None:
        """Mark the hospitals' reservations as used, in one write.

        Raises:
          LedgerError: one is not open, or the file cannot be written; none was settled.
        """

        def close() -> None:
            for hospital, reservation in reservations.items():
                self._open(hospital).settle(reservation)

        self._durably(close)

    def release(self, reservations: Mapping[str, str], reason: str) -> None:
        """Give reservations back under which nothing was trained, in one write.

        Raises:
          LedgerError: one is not open, or the file cannot be written; none was released.
        """

        def close() -> None:
            for hospital, reservation in reservations.items():
                self._open(hospital).release(reservation, reason)

        self._durably(close)

    def mark_unprotected(self, hospitals: Iterable[str], job: str, reason: str) -> None:
        """Write down that a job uses the hospitals' data without patient-level differential privacy, in one write.

        Raises:
          LedgerError: the file cannot be written; nothing was.
        """

        def mark() -> None:
            for hospital in hospitals:
                self._open(hospital).mark_unprotected(job, reason)

        self._durably(mark)

    def has_charges(self, hospital: str) -> bool:
        """Say whether a hospital's account holds any row beside those of unprotected jobs."""
        return self._open(hospital).has_charges()

    def spent(self, hospitals: Iterable[str], heads: Mapping[str, str] | None = None) -> dict[str, PrivacySpent]:
        """Return what each hospital has spent; with `heads` also the rows behind them, for the mirror."""
        spent = {}

        def read() -> None:
            for hospital in hospitals:
                ledger = self._open(hospital)
                own = ledger.spent()
                rows = ledger.rows_after(heads) if heads is not None else ()
                spent[hospital] = own.model_copy(update={"ledger_rows": rows})

        with self._file.reading() as connection, self._file.through(connection):
            read()
        return spent

    def export(self, hospitals: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return each account as plain data."""
        with self._file.reading() as connection, self._file.through(connection):
            return {hospital: self._open(hospital).export() for hospital in hospitals}

    def _durably(self, work: Callable[[], None]) -> None:
        try:
            with self._file.together():
                work()
        except BaseException:
            self._ledgers.clear()  # what they hold in memory may never have reached the file
            raise

    def _open(self, hospital: str) -> PrivacyLedger:
        if hospital not in self._ledgers:
            of = self._accounts(hospital)
            ledger = PrivacyLedger(self._file, (of.hospital, of.data_set), of.terms)
            ledger.head()  # reads and checks every row of the account
            self._ledgers[hospital] = ledger
        return self._ledgers[hospital]
