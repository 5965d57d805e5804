"""The coordinator's copies of the hospitals' ledgers: checked, signed by the coordinator, and never shortened.

One SQLite file holds all accounts, so that a round of many hospitals costs one write to the disk. A hospital
sends the rows behind the head that the coordinator knows, signed with the key that is pinned for it. A history that a
hospital lost and charged again has another beginning: it becomes a new generation, once it carries over every charge
of the one before, and the old rows stay.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError
from medfl_ray.messages import LedgerRows
from medfl_ray.store.ledger.events import (
    LedgerEvent,
    LedgerHead,
    check_chain,
    check_rows,
    genesis,
    hashes_link,
    holds,
    reservation_states,
)
from medfl_ray.store.ledger.export import EXPORT_FORMAT, read_export, verify_export
from medfl_ray.store.ledger.histories import left_out
from medfl_ray.store.ledger.key_receipts import KeyReceipt, append_receipt, check_key_receipts
from medfl_ray.store.ledger.mirror_file import MirrorFile
from medfl_ray.store.ledger.mirror_keys import Pin, add_key, other_key, pinned_keys, signer_of, unpinned_rows
from medfl_ray.store.signing_key import SigningKey, signature_is_valid

SIGNED_LABEL = "medfl-ray ledger mirror v1"
Account = tuple[str, str]


@dataclass(frozen=True)
class Known:
    """How far the mirror of one account goes, and with which key its hospital signs."""

    generation: int
    head: LedgerHead
    public_key: str


@dataclass(frozen=True)
class MirroredRows:
    """What became of a batch of rows: per hospital the newest row kept, or the reason why its rows were refused."""

    heads: dict[str, LedgerHead]
    problems: dict[str, str]


@dataclass(frozen=True)
class History:
    """One generation of an account: its checked rows, and the pinned key that signed them.

    The key is None for one that was replaced before keys were pinned: order and contents are checked alone.
    """

    public_key: str | None
    rows: tuple[LedgerEvent, ...]


class LedgerMirror:
    """A folder with the copies and the coordinator's own key; nothing is made before there is something to keep."""

    def __init__(self, folder: Path) -> None:
        self._file = MirrorFile(folder)
        self._states: dict[Account, tuple[LedgerHead, dict[str, str]]] = {}
        self._checked_keys: set[Pin] = set()

    def keep(self, export: Mapping[str, Any]) -> LedgerHead:
        """Take over a hospital's newest export and return its head.

        Raises:
          LedgerError: the export is damaged, or leaves out rows that this mirror has seen.
        """
        head = verify_export(export)
        account = (str(export["hospital"]), str(export["data_set"]))
        known = self.head(*account)
        if known is not None and known.sequence > head.sequence and not holds(read_export(export), known):
            raise _lost(account, known)
        rows = LedgerRows(
            hospital=account[0],
            data_set=account[1],
            public_key=str(export["public_key"]),
            events=tuple(export["events"]),
        )
        for problem in self.keep_rows([rows]).problems.values():
            raise LedgerError(problem)
        return head

    def keep_rows(self, batch: Iterable[LedgerRows]) -> MirroredRows:
        """Add new rows of any number of accounts, durable when this returns; rows that are known already are passed.

        An account without a pinned key has that of its first rows pinned.

        Raises:
          LedgerError: the mirror was altered, or cannot be written.
        """
        batch = [rows for rows in batch if rows.events]
        kept = MirroredRows({}, {})
        if not batch:
            return kept
        try:
            with self._file.writing() as connection:
                key = self._file.key(connection)
                for rows in batch:
                    try:
                        kept.heads[rows.hospital] = self._keep_one(connection, key, rows)
                    except LedgerError as error:
                        kept.problems[rows.hospital] = str(error)
        except BaseException:
            self._states.clear()  # what they say may never have reached the file
            raise
        return kept

    def pin(self, keys: Mapping[Account, str]) -> dict[Account, str]:
        """Pin the key of each account at its first contact; a key that is pinned stays.

        Returns:
          Per account that shows another key than the pinned one, the reason.

        Raises:
          LedgerError: the mirror or its receipts were altered, or cannot be written.
        """
        problems: dict[Account, str] = {}
        if not keys:
            return problems
        with self._file.writing() as connection:
            key = self._file.key(connection)
            for account, public_key in keys.items():
                pinned = self._keys(connection, key, account, store=True)
                check_key_receipts(self._file.folder, key, account, pinned)
                if not pinned:
                    add_key(connection, key, account, 1, public_key)
                elif pinned[-1] != public_key:
                    problems[account] = str(other_key(account, pinned[-1], public_key))
        return problems

    def accept_key(self, hospital: str, data_set: str, public_key: str) -> KeyReceipt | None:
        """Pin a key that an operator has confirmed, and write a receipt of it; None where it is the pinned one.

        Raises:
          LedgerError: the mirror or its receipts were altered, or cannot be written.
        """
        account = (hospital, data_set)
        with self._file.writing() as connection:
            key = self._file.key(connection)
            pinned = self._keys(connection, key, account, store=True)
            if pinned and pinned[-1] == public_key:
                return None
            # First the receipt: a crash between the two leaves a key that counts for nothing until it is given again.
            receipt = append_receipt(self._file.folder, key, account, pinned[-1] if pinned else None, public_key)
            add_key(connection, key, account, len(pinned) + 1, public_key)
        return receipt

    def head(self, hospital: str, data_set: str) -> LedgerHead | None:
        """Return the last row seen of an account: what its ledger must still hold; None where nothing was seen.

        Raises:
          LedgerError: the mirror was altered or cannot be read.
        """
        if not self._file.exists:
            return None
        with self._file.reading() as connection:
            known = self._known(connection, self._file.key(connection), (hospital, data_set))
        return known.head if known is not None else None

    def has_seen(self, hospital: str, data_set: str, head: LedgerHead) -> bool:
        """Say whether a row is among those ever kept of an account."""
        if not self._file.exists:
            return False
        with self._file.reading() as connection:
            found = connection.execute(
                "SELECT 1 FROM events WHERE hospital = ? AND data_set = ? AND sequence = ? AND hash = ?",
                (hospital, data_set, *head),
            )
            return found.fetchone() is not None

    def export(self, hospital: str, data_set: str) -> dict[str, Any] | None:
        """Return the copy of an account in the form of a ledger's export, for recovery.

        Raises:
          LedgerError: the mirror was altered or cannot be read.
        """
        if not self._file.exists:
            return None
        with self._file.reading() as connection:
            known = self._known(connection, self._file.key(connection), (hospital, data_set))
            if known is None:
                return None
            rows = _rows(connection, (hospital, data_set), known.generation)
        export = {
            "format": EXPORT_FORMAT,
            "hospital": hospital,
            "data_set": data_set,
            "unit": "patient",
            "adjacency": "add_remove",
            "public_key": known.public_key,
            "head": str(known.head),
            "events": rows,
        }
        verify_export(export)
        return export

    def accounts(self) -> list[Account]:
        """Return the (hospital, data set) pairs of which there are rows or a key."""
        if not self._file.exists:
            return []
        with self._file.reading() as connection:
            query = "SELECT hospital, data_set FROM heads UNION SELECT hospital, data_set FROM keys"
            return sorted(connection.execute(query).fetchall())

    def verify(self, hospital: str, data_set: str) -> tuple[tuple[str, ...], tuple[History, ...]]:
        """Check all that the mirror holds of an account, the receipts of its keys included.

        Returns:
          Its pinned keys and its generations, both with the newest last.

        Raises:
          LedgerError: names what was altered.
        """
        account = (hospital, data_set)
        if not self._file.exists:
            return (), ()
        with self._file.reading() as connection:
            key = self._file.key(connection)
            keys = self._keys(connection, key, account)
            check_key_receipts(self._file.folder, key, account, keys)
            known = self._known(connection, key, account)
            newest = known.generation if known is not None else 0
            bodies = [_rows(connection, account, number) for number in range(1, newest + 1)]
        histories = tuple(_checked(account, body, keys) for body in bodies)
        if known is None:
            return keys, histories
        if histories[-1].rows and histories[-1].public_key is None:
            raise unpinned_rows(account)
        if not histories[-1].rows or histories[-1].rows[-1].head != known.head:
            raise LedgerError(
                f"the mirror of hospital {hospital!r}, data set {data_set!r}, does not end at row "
                f"{known.head.sequence}, which the coordinator has signed: rows are missing at its end. Restore its "
                "folder from a backup"
            )
        return keys, histories

    def _keep_one(self, connection: sqlite3.Connection, key: SigningKey, rows: LedgerRows) -> LedgerHead:
        account = (rows.hospital, rows.data_set)
        events = [LedgerEvent.from_mapping(row) for row in rows.events]
        known = self._known(connection, key, account)
        pinned = self._keys(connection, key, account, store=True)
        if pinned and pinned[-1] != rows.public_key:
            raise other_key(account, pinned[-1], rows.public_key)
        generation, previous, added = _placed(connection, account, known, events)
        if not added:
            return previous
        if known is not None and generation == known.generation and rows.public_key != known.public_key:
            raise LedgerError(
                f"the newest rows of hospital {account[0]!r}, data set {account[1]!r}, are signed with another key "
                "than those before; a new key starts a new history, which `medfl-ray privacy ledger recover` connects"
            )
        kept_head, states = self._states.pop(account, (None, {}))
        if kept_head != previous:
            earlier = _rows(connection, account, generation) if previous.sequence else []
            states = reservation_states(map(LedgerEvent.from_mapping, earlier))
        check_rows(account, previous, states, added, rows.public_key)
        if known is not None and generation > known.generation:
            _check_replacement(account, _rows(connection, account, known.generation), events)
        if not pinned:
            add_key(connection, key, account, 1, rows.public_key)
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
            [(*account, generation, row.sequence, row.hash, json.dumps(row.to_dict())) for row in added],
        )
        newest = Known(generation, added[-1].head, rows.public_key)
        connection.execute(
            "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*account, generation, *newest.head, rows.public_key, key.sign(_signed_text(account, newest))),
        )
        self._states[account] = (newest.head, states)
        return newest.head

    def _keys(
        self, connection: sqlite3.Connection, key: SigningKey, account: Account, store: bool = False
    ) -> tuple[str, ...]:
        """Return the account's pinned keys; that of the newest rows where a mirror was kept before keys were pinned.

        Args:
          store: write such a key down as the first pinned one.
        """
        known = self._known(connection, key, account)
        keys = pinned_keys(connection, key, account, self._checked_keys)
        if known is None or known.public_key in keys:
            return keys
        if keys:
            raise unpinned_rows(account)
        if store:
            add_key(connection, key, account, 1, known.public_key)
        return (known.public_key,)

    def _known(self, connection: sqlite3.Connection, key: SigningKey, account: Account) -> Known | None:
        row = connection.execute(
            "SELECT generation, sequence, hash, public_key, signature FROM heads WHERE hospital = ? AND data_set = ?",
            account,
        ).fetchone()
        if row is None:
            return None
        generation, sequence, digest, public_key, signature = row
        known = Known(generation, LedgerHead(sequence, digest), public_key)
        if not signature_is_valid(key.public_key, _signed_text(account, known), signature):
            raise LedgerError(
                f"the coordinator's mirror of hospital {account[0]!r}, data set {account[1]!r}, is not what the "
                "coordinator signed: it was altered. Restore the mirror's folder from a backup"
            )
        return known


def _placed(
    connection: sqlite3.Connection, account: Account, known: Known | None, events: list[LedgerEvent]
) -> tuple[int, LedgerHead, list[LedgerEvent]]:
    """Return where rows belong: the generation, the head before them, and those of them that are new."""
    first, last = events[0].sequence, events[-1].sequence
    if known is None:
        return 1, genesis(*account), events
    head = known.head
    if last <= head.sequence:  # two answers under way at the same time: the later one may know less
        query = "SELECT hash FROM events WHERE hospital = ? AND data_set = ? AND generation = ? AND sequence = ?"
        found = connection.execute(query, (*account, known.generation, last)).fetchone()
        if found is not None and found[0] == events[-1].hash:
            return known.generation, head, []
    elif first == head.sequence + 1:
        return known.generation, head, events
    elif 1 <= first <= head.sequence < first + len(events) and events[head.sequence - first].hash == head.hash:
        return known.generation, head, events[head.sequence - first + 1 :]
    if first == 1 and holds(events, head):
        return known.generation + 1, genesis(*account), events
    raise _lost(account, head)


def _checked(account: Account, body: list[dict[str, Any]], keys: Sequence[str]) -> History:
    rows = tuple(map(LedgerEvent.from_mapping, body))
    signer = signer_of(rows, keys) if rows else None
    if signer is None and not hashes_link(account, rows):
        raise unpinned_rows(account)
    if signer is not None:
        check_chain(account, (), rows, signer)
    return History(signer, rows)


def _check_replacement(account: Account, earlier: list[dict[str, Any]], later: list[LedgerEvent]) -> None:
    """Refuse a new history that says less than the one it replaces, whoever signed it and whatever it calls itself."""
    problem = left_out([LedgerEvent.from_mapping(row) for row in earlier], later)
    if problem:
        raise LedgerError(
            f"the ledger of hospital {account[0]!r}, data set {account[1]!r}, shows another history than before, which "
            f"does not carry over all that was charged: {problem}. `medfl-ray privacy ledger recover` with this mirror "
            "must charge it again first"
        )


def _rows(connection: sqlite3.Connection, account: Account, generation: int) -> list[dict[str, Any]]:
    query = "SELECT body FROM events WHERE hospital = ? AND data_set = ? AND generation = ? ORDER BY sequence"
    return [json.loads(body) for (body,) in connection.execute(query, (*account, generation))]


def _signed_text(account: Account, known: Known) -> str:
    text = json.dumps([SIGNED_LABEL, *account, known.generation, known.public_key, str(known.head)])
    return hashlib.sha256(text.encode()).hexdigest()


def _lost(account: Account, head: LedgerHead) -> LedgerError:
    return LedgerError(
        f"the ledger of hospital {account[0]!r}, data set {account[1]!r}, no longer holds row {head.sequence} that it "
        "showed before; `medfl-ray privacy ledger recover` must charge the mirrored history first"
    )
