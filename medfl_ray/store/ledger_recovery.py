"""Bringing a lost, shortened, replaced or damaged ledger back from what a mirror remembers of it.

Whatever the mirror or a readable row says was charged is charged afterwards. Recovery may charge twice what
two histories tell differently; it never charges less than either.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger import PrivacyLedger
from medfl_ray.store.ledger_events import LedgerEvent, LedgerHead, charges, genesis, holds, is_genuine
from medfl_ray.store.ledger_export import read_export, verify_export
from medfl_ray.store.ledger_file import KEY_NAME, LedgerFile
from medfl_ray.store.signing_key import SigningKey, load_key

Account = tuple[str, str]
SMALLEST_ROW_BYTES = 256  # hash, previous hash and signature alone


def recover(path: Path, exports: Sequence[Mapping[str, Any]], delta: float) -> dict[Account, int]:
    """Charge in a hospital's ledger everything that its mirrored exports show, and open it again.

    Args:
      path: the ledger's file in the hospital's state folder; a damaged file is kept beside it under another name.
      exports: the mirrored exports of the hospital's accounts; of one account there may be several.
      delta: of the accounts, in (0, 1).

    Returns:
      The number of rows added, per (hospital, data set).

    Raises:
      LedgerError: an export is damaged; or the damaged file shows an account of which no export was given, or has
        rows that can be read neither there nor in an export, so that what they charged is unknown.
    """
    histories = _longest_histories(exports)
    salvaged = _set_aside_if_damaged(path, histories)
    file = LedgerFile(path, recovering=True)
    added: dict[Account, int] = {}
    for account, rows in histories:
        ledger = PrivacyLedger(file, account, delta, None)
        before = len(ledger.events())
        head = rows[-1].head if rows else genesis(*account)
        _take_over(ledger, file.key, head, rows)
        known = {row.reservation for other, history in histories if other == account for row in history} - {None}
        own = [row for row in salvaged if (row.hospital, row.data_set) == account and row.reservation not in known]
        lost = _unknown(ledger, own)
        if lost:
            ledger.charge_again(lost, head)
        salvaged = [row for row in salvaged if (row.hospital, row.data_set) != account]
        added[account] = added.get(account, 0) + len(ledger.events()) - before
        ledger.check_holds(head)
    return added


def _longest_histories(exports: Sequence[Mapping[str, Any]]) -> list[tuple[Account, tuple[LedgerEvent, ...]]]:
    """Return the checked rows of each export, without those that another export continues."""
    for export in exports:
        verify_export(export)
    histories = [((str(export["hospital"]), str(export["data_set"])), read_export(export)) for export in exports]
    histories.sort(key=lambda history: len(history[1]), reverse=True)
    kept: list[tuple[Account, tuple[LedgerEvent, ...]]] = []
    for account, rows in histories:
        if not any(account == other and longer[: len(rows)] == rows for other, longer in kept):
            kept.append((account, rows))
    return kept


def _take_over(ledger: PrivacyLedger, key: SigningKey, head: LedgerHead, rows: Sequence[LedgerEvent]) -> None:
    """Continue the ledger with the mirror's rows where it is their beginning; else charge what it lacks."""
    own = ledger.events()
    if holds(own, head):
        return
    if tuple(rows[: len(own)]) == own and all(is_genuine(row, key.public_key) for row in rows):
        ledger.append_mirrored(rows[len(own) :])
        return
    # Also where every charge is there already: the row that says so is what makes the mirror's head count as held.
    ledger.charge_again(_unknown(ledger, rows), head)


def _unknown(ledger: PrivacyLedger, rows: Sequence[LedgerEvent]) -> list[LedgerEvent]:
    """Return the charges of another history that this ledger does not hold."""
    held = {event.reservation for event in charges(ledger.events())}
    return [row for row in charges(rows) if row.reservation not in held]


def _set_aside_if_damaged(
    path: Path, histories: Sequence[tuple[Account, tuple[LedgerEvent, ...]]]
) -> list[LedgerEvent]:
    """Rename a file that is damaged or whose rows are bad; return those of its rows that are credible."""
    if not path.exists():
        return []
    mirrored = {account for account, _ in histories}
    rows, num_lost = _readable_rows(path)
    try:
        file = LedgerFile(path)
        file.check_integrity()
        for account in file.accounts():
            PrivacyLedger(file, account, 0.5, None).verify()
    except LedgerError:
        key = path.with_name(KEY_NAME)
        credible = _credible(rows, load_key(key) if key.exists() else None)
        unknown = {(row.hospital, row.data_set) for row in rows} - mirrored
        if unknown:
            raise LedgerError(
                f"the damaged ledger {path.name!r} also holds {len(unknown)} data set(s) of which no mirror was given: "
                f"{', '.join(sorted(data_set for _, data_set in unknown))}. Give the mirrors of all of them."
            ) from None
        readable = {row.hash for row in rows}
        num_explained = len({row.hash for _, history in histories for row in history} - readable)
        if num_lost > num_explained:
            raise LedgerError(
                f"{num_lost} rows of the damaged ledger {path.name!r} cannot be read and the mirrors given hold "
                f"{num_explained} of them: what the others charged is unknown. Give newer mirrors, those of all data "
                "sets, or restore the file from a backup."
            ) from None
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        for part in (path, *path.parent.glob(f"{path.name}-*")):
            part.rename(part.with_name(f"damaged-{stamp}-{part.name}"))
        return credible
    return []


def _credible(rows: Sequence[LedgerEvent], key: SigningKey | None) -> list[LedgerEvent]:
    """Return the rows that the hospital signed; where its key is lost, every charge and nothing that takes one back."""
    if key is not None:
        return [row for row in rows if is_genuine(row, key.public_key)]
    return [row for row in rows if row.kind == "reserve" and None not in (row.noise_multiplier, row.num_steps)]


def _readable_rows(path: Path) -> tuple[list[LedgerEvent], int]:
    """Return the rows that can still be read, unchecked, in order, and how many before the last one cannot.

    Each is looked up on its own, in the table and not in an index, for one bad page must not hide the others. Rows
    are numbered without a gap, so that a missing number is a lost row. A file that is no database gives neither.
    """
    rows: dict[int, LedgerEvent] = {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            for number in range(1, _most_rows(path) + 1):
                row = _read_row(connection, number)
                if row is not None:
                    rows[number] = row
            last = max([*rows, _last_number(connection)])
    except sqlite3.Error:
        return [], 0
    ordered = sorted(rows.values(), key=lambda row: (row.hospital, row.data_set, row.sequence))
    return ordered, last - len(rows)


def _most_rows(path: Path) -> int:
    """Return more rows than the file, with what is not yet written back into it, can hold."""
    parts = (path, path.with_name(f"{path.name}-wal"))
    return sum(part.stat().st_size for part in parts if part.exists()) // SMALLEST_ROW_BYTES


def _read_row(connection: sqlite3.Connection, number: int) -> LedgerEvent | None:
    try:
        found = connection.execute("SELECT * FROM ledger_events NOT INDEXED WHERE id = ?", (number,)).fetchone()
        return LedgerEvent.from_mapping(dict(found)) if found is not None else None
    except (sqlite3.DatabaseError, LedgerError, UnicodeDecodeError):
        return None


def _last_number(connection: sqlite3.Connection) -> int:
    try:
        return int(connection.execute("SELECT max(id) FROM ledger_events NOT INDEXED").fetchone()[0] or 0)
    except (sqlite3.DatabaseError, TypeError, ValueError):
        return 0
