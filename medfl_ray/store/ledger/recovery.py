"""Bringing a lost, shortened, replaced or damaged ledger back from what a mirror remembers of it.

Whatever the mirror or a readable row says was charged is charged afterwards. Recovery may charge twice what
two histories tell differently; it never charges less than either. Where nobody can say how many rows were lost it
refuses: a mirror cannot prove that it has seen the last one. It refuses too where a row can be read neither in the file
nor in a mirror. A mirror's row stands for a lost one only where its history is the file's own: rows behind the first
disagreement stand for nothing, and rows behind the last readable one only where the mirror holds that one.

What follows the last readable row has left its place and its reservation in the indices, and no hash. A mirror that
splits from the file there is told apart by its reservations; one that differs in nothing but rows that reserve nothing
is not, nor is any where the indices are bad as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.budgets import AccountTerms
from medfl_ray.store.ledger.events import (
    LedgerEvent,
    LedgerHead,
    charges,
    genesis,
    holds,
    is_genuine,
    reservation_states,
    unprotected_jobs,
)
from medfl_ray.store.ledger.export import read_export, verify_export
from medfl_ray.store.ledger.file import KEY_NAME, LedgerFile
from medfl_ray.store.private_files import claim_state_folder
from medfl_ray.store.signing_key import SigningKey, load_key
from medfl_ray.store.tables import ledger_events

Account = tuple[str, str]
SMALLEST_ROW_BYTES = 256  # hash, previous hash and signature alone
BY_PLACE, BY_RESERVATION = (f"INDEXED BY sqlite_autoindex_{ledger_events.name}_{n}" for n in (1, 2))


class _Lost(NamedTuple):
    """What the indices still say of a row that cannot be read; None for what they do not."""

    place: tuple[Account, int] | None = None
    reservation: str | None = None
    """Empty for a row that reserves nothing."""


def recover(path: Path, exports: Sequence[Mapping[str, Any]], delta: float) -> dict[Account, int]:
    """Charge in a hospital's ledger everything that its mirrored exports show, and open it again.

    Args:
      path: the ledger's file in the hospital's state folder; a damaged file is kept beside it under another name.
      exports: the mirrored exports of the hospital's accounts; of one account there may be several.
      delta: of the accounts, in (0, 1).

    Returns:
      The number of rows added, per (hospital, data set).

    Raises:
      LedgerError: an export is damaged; others may enter the folder; or the damaged file shows an account of which no
        export was given, or has rows that can be read neither there nor in an export, or that cannot even be counted,
        so that what they charged is unknown.
    """
    histories = _longest_histories(exports)
    claim_state_folder(path.parent, holds_ledger=path.exists())
    salvaged = _set_aside_if_damaged(path, histories)
    file = LedgerFile(path, recovering=True)
    added: dict[Account, int] = {}
    for account, rows in histories:
        ledger = PrivacyLedger(file, account, AccountTerms(delta=delta))
        before = len(ledger.events())
        head = rows[-1].head if rows else genesis(*account)
        _take_over(ledger, file.key, head, rows)
        known = {row.reservation for other, history in histories if other == account for row in history} - {None}
        own = [row for row in salvaged if (row.hospital, row.data_set) == account and row.reservation not in known]
        lost, exposed = _unknown(ledger, own), _unknown_jobs(ledger, own)
        if lost or exposed:
            ledger.charge_again(lost, head, exposed)
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
    if not holds(own, head):
        if tuple(rows[: len(own)]) == own and all(is_genuine(row, key.public_key) for row in rows):
            ledger.append_mirrored(rows[len(own) :])
            return
        # Also where every charge is there already: the row that says so makes the mirror's head count as held.
        ledger.charge_again(_unknown(ledger, rows), head, _unknown_jobs(ledger, rows))
    _settle_like(ledger, rows)


def _settle_like(ledger: PrivacyLedger, rows: Sequence[LedgerEvent]) -> None:
    """Settle what the mirror shows as settled, and what an old copy of the ledger could still give back."""
    own = reservation_states(ledger.events())
    for reservation, state in reservation_states(rows).items():
        if state in ("settle", "again") and own.get(reservation) == "reserved":
            ledger.settle(reservation)


def _unknown_jobs(ledger: PrivacyLedger, rows: Sequence[LedgerEvent]) -> dict[str, str]:
    """Return the unprotected jobs of another history that this ledger does not name, and the reason of each."""
    held = unprotected_jobs(ledger.events())
    return {job: reason for job, reason in unprotected_jobs(rows).items() if job not in held}


def _unknown(ledger: PrivacyLedger, rows: Sequence[LedgerEvent]) -> list[LedgerEvent]:
    """Return the charges of another history that this ledger does not hold."""
    held = {event.reservation for event in charges(ledger.events())}
    return [row for row in charges(rows) if row.reservation not in held]


def _set_aside_if_damaged(
    path: Path, histories: Sequence[tuple[Account, tuple[LedgerEvent, ...]]]
) -> list[LedgerEvent]:
    """Rename a file that is damaged or whose rows are bad; return those of its rows that are credible."""
    if not path.exists() or path.stat().st_size == 0:
        if any(part.stat().st_size for part in _journals(path)):
            raise _uncounted(path)  # rows that were not yet written back, of which SQLite would drop all
        if not path.exists():
            return []
    mirrored = {account for account, _ in histories}
    rows, num_lost = _readable_rows(path)
    try:
        file = LedgerFile(path)
        file.check_integrity()
        for account in file.accounts():
            PrivacyLedger(file, account, AccountTerms(delta=0.5)).verify()
    except LedgerError:
        if num_lost is None:
            raise _uncounted(path) from None
        key_path = path.with_name(KEY_NAME)
        key = load_key(key_path) if key_path.exists() else None
        unknown = {(row.hospital, row.data_set) for row in rows} - mirrored
        if unknown:
            raise LedgerError(
                f"the damaged ledger {path.name!r} also holds {len(unknown)} data set(s) of which no mirror was given: "
                f"{', '.join(sorted(data_set for _, data_set in unknown))}. Give the mirrors of all of them."
            ) from None
        num_unknown = _num_unexplained(rows, _lost_rows(path) if num_lost else [], key, histories)
        if num_unknown:
            raise LedgerError(
                f"{num_unknown} rows of the damaged ledger {path.name!r} cannot be read, or were altered, and stand in "
                "none of the mirrors given, as far as these tell the file's own history: what the others charged is "
                "unknown. Give newer mirrors, those of all data sets and of all coordinators that trained on them, or "
                "restore the file from a backup."
            ) from None
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        for part in (path, *path.parent.glob(f"{path.name}-*")):
            part.rename(part.with_name(f"damaged-{stamp}-{part.name}"))
        return _credible(rows, key)
    return []


def _num_unexplained(
    rows: Sequence[LedgerEvent],
    lost: Sequence[_Lost],
    key: SigningKey | None,
    histories: Sequence[tuple[Account, tuple[LedgerEvent, ...]]],
) -> int:
    """Return how many rows of a damaged file neither it nor the mirrors show as they were; 0 where that is certain.

    A lost row is known by its hash where a row that follows it can be read, and else by what the indices say of it.
    """
    in_mirrors, readable = {row.hash for _, history in histories for row in history}, {row.hash for row in rows}
    whole = [row for row in rows if (row.digest() == row.hash if key is None else is_genuine(row, key.public_key))]
    num_altered = len(readable - {row.hash for row in whole} - in_mirrors)
    named = {row.previous_hash for row in whole if row.sequence > 1} - readable - in_mirrors
    num_missing = _num_beyond_mirrors(whole, lost, len(rows) - len(whole), histories) if lost else 0
    return max(num_altered + len(named), num_missing)


def _num_beyond_mirrors(
    whole: Sequence[LedgerEvent],
    lost: Sequence[_Lost],
    num_altered: int,
    histories: Sequence[tuple[Account, tuple[LedgerEvent, ...]]],
) -> int:
    """Return how many lost rows no history that is the file's own reaches.

    Lost rows of which nothing tells the place fill the gaps of the accounts first, in which altered rows may stand as
    well. The others follow the end of some account: each account's histories must reach far enough for all of them.
    """
    mirrored = {row.reservation: (account, row.sequence) for account, rows in histories for row in rows}
    places = [(row.place or (mirrored.get(row.reservation) if row.reservation else None), row) for row in lost]
    placed = {place: row.reservation for place, row in places if place}
    num_foreign = sum(bool(row.reservation) and row.reservation not in mirrored for row in lost)
    known = {((row.hospital, row.data_set), row.sequence) for row in whole} | set(placed)
    ends = {account: 0 for account, _ in histories}
    for account, sequence in known:
        ends[account] = max(ends.get(account, 0), sequence)
    gaps = {(account, sequence) for account, end in ends.items() for sequence in range(1, end)} - known
    num_behind = max(0, len(lost) - len(placed) - max(0, len(gaps) - num_altered))
    reach = {
        account: max((_reach(rows, whole, placed) for other, rows in histories if other == account), default=0)
        for account in ends
    }
    num_inside = sum(sequence > reach[account] for account, sequence in gaps | set(placed))
    short = [num_behind - max(0, reach[account] - end) for account, end in ends.items()]
    return max(num_foreign, num_inside + max(0, max(short, default=num_behind)))


def _reach(
    history: Sequence[LedgerEvent],
    whole: Sequence[LedgerEvent],
    placed: Mapping[tuple[Account, int], str | None],
) -> int:
    """Return up to which of its rows a mirror's history is the file's own.

    A row that both hold proves all before it. What follows the last such row counts only where the file itself shows
    nothing later, and up to where the reservations in its indices are others.
    """
    if not history:
        return 0
    account = (history[0].hospital, history[0].data_set)
    own = {row.sequence: row for row in whole if (row.hospital, row.data_set) == account}
    num_agreed = 0
    for row in history:
        seen = placed.get((account, row.sequence))
        if (row.sequence in own and own[row.sequence].hash != row.hash) or seen not in (None, row.reservation or ""):
            break
        num_agreed += 1
    hashes = {row.hash for row in own.values()} | {row.previous_hash for row in own.values()}
    reserved = {reservation for reservation in placed.values() if reservation}
    shared = (row.sequence for row in history[:num_agreed] if row.hash in hashes or row.reservation in reserved)
    proven = max(shared, default=0)
    return num_agreed if proven >= max(own, default=1) else proven


def _credible(rows: Sequence[LedgerEvent], key: SigningKey | None) -> list[LedgerEvent]:
    """Return the rows that the hospital signed; where its key is lost, all that charges and nothing that takes back."""
    if key is not None:
        return [row for row in rows if is_genuine(row, key.public_key)]
    whole = [row for row in rows if row.kind == "reserve" and None not in (row.noise_multiplier, row.num_steps)]
    return whole + [row for row in rows if row.kind == "unprotected" and row.job and row.reason]


def _uncounted(path: Path) -> LedgerError:
    return LedgerError(
        f"the rows of the damaged ledger {path.name!r} cannot be counted: how many were lost, and what they charged, "
        "is unknown, and no mirror can prove that it has seen the last of them. Restore the file from a backup, then "
        "recover it with the newest mirrors. Only if you know from elsewhere that nothing was charged behind the "
        f"mirrors, move {path.name} and {path.name}-* out of the state folder: a ledger that is gone is charged what "
        "the mirrors hold, and nothing else"
    )


def _journals(path: Path) -> list[Path]:
    """Return the files in which SQLite keeps what is not yet in the ledger's own."""
    return [part for ending in ("-wal", "-journal") if (part := path.with_name(path.name + ending)).exists()]


def _readable_rows(path: Path) -> tuple[list[LedgerEvent], int | None]:
    """Return the rows that can still be read, unchecked, in order, and how many others there were.

    Each is looked up on its own, in the table and not in an index, for one bad page must not hide the others. Rows
    are numbered without a gap, so that a missing number is a lost row. The number of lost rows is None where nothing
    says which was the last: the header, the schema, or the ends of the table and of all its indices are bad.
    """
    if path.stat().st_size == 0:
        return [], 0
    rows: dict[int, LedgerEvent] = {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            last = _last_number(connection)
            for number in range(1, _most_rows(path) + 1) if last is not None else ():
                row = _read_row(connection, number)
                if row is not None:
                    rows[number] = row
    except sqlite3.Error:
        return [], None
    ordered = sorted(rows.values(), key=lambda row: (row.hospital, row.data_set, row.sequence))
    return ordered, None if last is None else max([last, *rows]) - len(rows)


def _most_rows(path: Path) -> int:
    """Return more rows than the file, with what is not yet written back into it, can hold."""
    return sum(part.stat().st_size for part in (path, *_journals(path))) // SMALLEST_ROW_BYTES


def _read_row(connection: sqlite3.Connection, number: int) -> LedgerEvent | None:
    try:
        found = connection.execute("SELECT * FROM ledger_events NOT INDEXED WHERE id = ?", (number,)).fetchone()
        return LedgerEvent.from_mapping(dict(found)) if found is not None else None
    except (sqlite3.DatabaseError, LedgerError, UnicodeDecodeError):
        return None


def _last_number(connection: sqlite3.Connection) -> int | None:
    """Return the largest row number that the table or an index of it names; None where none of them can be read."""
    found = []
    for place in ("NOT INDEXED", BY_RESERVATION, BY_PLACE):
        try:
            (number,) = connection.execute(f"SELECT max(id) FROM ledger_events {place}").fetchone()
        except (sqlite3.DatabaseError, TypeError):
            continue
        found.append(number or 0)
    return max(found, default=None)


def _lost_rows(path: Path) -> list[_Lost]:
    """Return what the indices say of each row that cannot be read, of a file whose rows can be counted."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        reservations = _index_entries(connection, ("reservation",), BY_RESERVATION)
        places = _index_entries(connection, ("hospital", "data_set", "sequence"), BY_PLACE)
        connection.row_factory = sqlite3.Row
        readable = [n for n in range(1, _most_rows(path) + 1) if _read_row(connection, n) is not None]
        last = max([_last_number(connection) or 0, *readable])
    lost = []
    for number in sorted(set(range(1, last + 1)) - set(readable)):
        hospital, data_set, sequence = places.get(number, (None, None, None))
        is_place = isinstance(hospital, str) and isinstance(data_set, str) and isinstance(sequence, int)
        reservation = str(reservations[number][0] or "") if number in reservations else None
        lost.append(_Lost(((hospital, data_set), sequence) if is_place else None, reservation))
    return lost


def _index_entries(connection: sqlite3.Connection, columns: Sequence[str], index: str) -> dict[int, tuple[Any, ...]]:
    """Return an index's entries by row number: those before its first bad page and those behind its last."""
    found: dict[int, tuple[Any, ...]] = {}
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{column} {direction}" for column in columns)
        try:
            for number, *values in connection.execute(
                f"SELECT id, {', '.join(columns)} FROM ledger_events {index} ORDER BY {order}"
            ):
                found[number] = tuple(values)
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            continue
    return found
