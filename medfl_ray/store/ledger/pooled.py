"""The account of data that several hospitals pool for one training: each hospital's own ledger is charged."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from medfl_ray.errors import LedgerError, PrivacyError
from medfl_ray.messages import LedgerRows, Mechanism, PrivacySpent
from medfl_ray.store.ledger.account import PrivacyLedger


class PooledLedger:
    """Several hospitals' ledgers, charged together or not at all.

    A ledger of the pool's own would forget what the same patients' data have cost at home, and home would
    never learn what the pool cost.
    """

    def __init__(self, ledgers: Sequence[PrivacyLedger]) -> None:
        """Take the ledger of each hospital whose data are pooled."""
        self._ledgers = tuple(ledgers)
        self._open: dict[str, tuple[str, ...]] = {}

    def reserve(self, job: str, round: int, attempt: int, mechanism: Mechanism, budget: float | None) -> str:
        """Charge the mechanism to every hospital; where one refuses, the others get their charge back.

        Raises:
          BudgetExceeded, LedgerError: of the first hospital that refuses.
        """
        reserved: list[str] = []
        try:
            for ledger in self._ledgers:
                reserved.append(ledger.reserve(job, round, attempt, mechanism, budget))
        except PrivacyError:
            for ledger, reservation in zip(self._ledgers, reserved, strict=False):
                ledger.release(reservation, "another hospital of the pooled training refused; nothing was trained")
            raise
        name = secrets.token_hex(16)
        self._open[name] = tuple(reserved)
        return name

    def settle(self, reservation: str, mechanism: Mechanism | None = None) -> None:
        """Mark the charge as used at every hospital, where the mechanism about to be trained is what was charged.

        Raises:
          LedgerError: of the first hospital that charged another one, or whose reservation is not open.
        """
        for ledger, own in zip(self._ledgers, self._close(reservation), strict=True):
            ledger.settle(own, mechanism=mechanism)

    def release(self, reservation: str, reason: str) -> None:
        """Give the charge back at every hospital."""
        for ledger, own in zip(self._ledgers, self._close(reservation), strict=True):
            ledger.release(own, reason)

    def mark_unprotected(self, job: str, reason: str) -> None:
        """Write down at every hospital that a job uses its data without patient-level differential privacy."""
        for ledger in self._ledgers:
            ledger.mark_unprotected(job, reason)

    def has_charges(self) -> bool:
        """Say whether any hospital's account holds a row beside those of unprotected jobs."""
        return any(ledger.has_charges() for ledger in self._ledgers)

    def is_unprotected(self) -> bool:
        """Say whether any hospital's account has an infinite epsilon."""
        return any(ledger.is_unprotected() for ledger in self._ledgers)

    def spent(self) -> PrivacySpent:
        """Return what the hospital has spent that has spent most."""
        return max((ledger.spent() for ledger in self._ledgers), key=lambda spent: spent.epsilon)

    def check_heads(self, heads: Mapping[str, str]) -> None:
        """Refuse to go on where one of the ledgers lacks the row that the coordinator has seen of it."""
        for ledger in self._ledgers:
            ledger.check_heads(heads)

    def rows_after(self, heads: Mapping[str, str]) -> tuple[LedgerRows, ...]:
        """Return the newest rows of every hospital's ledger."""
        return tuple(rows for ledger in self._ledgers for rows in ledger.rows_after(heads))

    def export(self) -> dict[str, Any]:
        """Return nothing: each hospital's own export holds its charges."""
        return {}

    def _close(self, reservation: str) -> tuple[str, ...]:
        if reservation not in self._open:
            raise LedgerError(f"the pooled reservation {reservation!r} is not open; reserve again")
        return self._open.pop(reservation)
