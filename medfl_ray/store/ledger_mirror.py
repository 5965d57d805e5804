"""The coordinator's copies of the hospitals' ledgers: checked, signed by the coordinator, and never shortened.

One SQLite file holds all accounts, so that a round of many hospitals costs one write to the disk. A hospital
sends the rows behind the head that the coordinator knows. A history that a hospital lost and charged again has
another beginning: it becomes a new generation, and the old rows stay.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError
from medfl_ray.messages import LedgerRows
from medfl_ray.store.ledger_events import (
    LedgerEvent,
    LedgerHead,
    check_rows,
    genesis,
    holds,
    reservation_states,
)
from medfl_ray.store.ledger_export import EXPORT_FORMAT, verify_export
from medfl_ray.store.signing_key import SigningKey, create_key, load_key, signature_is_valid

MIRROR_NAME = "mirror.sqlite"
COORDINATOR_KEY_NAME = "coordinator.key"
SIGNED_LABEL = "medfl-ray ledger mirror v1"
LOCK_TIMEOUT_S = 30.0
TABLES = (
    """CREATE TABLE IF NOT EXISTS heads (
      hospital TEXT, data_set TEXT, generation INTEGER, sequence INTEGER, hash TEXT, public_key TEXT, signature TEXT,
      PRIMARY KEY (hospital, data_set)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS events (
      hospital TEXT, data_set TEXT, generation INTEGER, sequence INTEGER, hash TEXT, body TEXT,
      PRIMARY KEY (hospital, data_set, generation, sequence)) WITHOUT ROWID""",
)
Account = tuple[str, str]


@dataclass(frozen=True)
class Known:
    """How far the mirror of one account goes, and with which key its hospital signs."""

    generation: int
    head: LedgerHead
    public_key: str


@dataclass(frozen=True)
class Kept:
    """What became of a batch of rows: per hospital the newest row kept, or the reason why its rows were refused."""

    heads: dict[str, LedgerHead]
    problems: dict[str, str]


class LedgerMirror:
    """A folder with the copies and the coordinator's own key; nothing is made before the first rows arrive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._states: dict[Account, tuple[LedgerHead, dict[str, str]]] = {}

    def keep(self, export: Mapping[str, Any]) -> LedgerHead:
        """Take over a hospital's newest export and return its head.

        Raises:
          LedgerError: the export is damaged, or leaves out rows that this mirror has seen.
        """
        head = verify_export(export)
        account = (str(export["hospital"]), str(export["data_set"]))
        known = self.head(*account)
        if known is not None and known.sequence > head.sequence:
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

    def keep_rows(self, batch: Iterable[LedgerRows]) -> Kept:
        """Add new rows of any number of accounts, durable when this returns; rows that are known already are passed.

        Raises:
          LedgerError: the mirror was altered, or cannot be written.
        """
        batch = [rows for rows in batch if rows.events]
        kept = Kept({}, {})
        if not batch:
            return kept
        with self._writing() as connection:
            key = self._key(connection)
            for rows in batch:
                try:
                    kept.heads[rows.hospital] = self._keep_one(connection, key, rows)
                except LedgerError as error:
                    kept.problems[rows.hospital] = str(error)
        return kept

    def head(self, hospital: str, data_set: str) -> LedgerHead | None:
        """Return the last row seen of an account: what its ledger must still hold; None where nothing was seen.

        Raises:
          LedgerError: the mirror was altered or cannot be read.
        """
        if not self._path.exists():
            return None
        with self._reading() as connection:
            known = self._known(connection, self._key(connection), (hospital, data_set))
        return known.head if known is not None else None

    def has_seen(self, hospital: str, data_set: str, head: LedgerHead) -> bool:
        """Say whether a row is among those ever kept of an account."""
        if not self._path.exists():
            return False
        with self._reading() as connection:
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
        if not self._path.exists():
            return None
        with self._reading() as connection:
            known = self._known(connection, self._key(connection), (hospital, data_set))
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
        """Return the (hospital, data set) pairs of which there is a copy."""
        if not self._path.exists():
            return []
        with self._reading() as connection:
            return sorted(connection.execute("SELECT hospital, data_set FROM heads").fetchall())

    @property
    def _path(self) -> Path:
        return self._folder / MIRROR_NAME

    def _keep_one(self, connection: sqlite3.Connection, key: SigningKey, rows: LedgerRows) -> LedgerHead:
        account = (rows.hospital, rows.data_set)
        events = [LedgerEvent.from_mapping(row) for row in rows.events]
        known = self._known(connection, key, account)
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

    def _key(self, connection: sqlite3.Connection) -> SigningKey:
        path = self._folder / COORDINATOR_KEY_NAME
        if path.exists():
            return load_key(path)
        if connection.execute("SELECT count(*) FROM heads").fetchone()[0]:
            raise LedgerError(
                f"the coordinator's key {COORDINATOR_KEY_NAME!r} is missing beside its mirror {MIRROR_NAME!r}; restore "
                "it from a backup, because without it the mirror cannot be checked"
            )
        return create_key(path)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _in_plain_words(), closing(self._connect()) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Hold the only write lock until the block ends: on the disk, or not at all."""
        with _in_plain_words():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with closing(self._connect()) as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    self._states.clear()
                    raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        for table in TABLES:
            connection.execute(table)
        return connection


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
    elif first <= head.sequence and events[head.sequence - first].hash == head.hash:
        return known.generation, head, events[head.sequence - first + 1 :]
    if first == 1 and holds(events, head):
        return known.generation + 1, genesis(*account), events
    raise _lost(account, head)


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


@contextmanager
def _in_plain_words() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) else str(error)
        raise LedgerError(
            f"the coordinator's mirror {MIRROR_NAME!r} of the hospitals' ledgers cannot be used: {detail}. Check the "
            "disk and its folder, or restore it from a backup"
        ) from None
