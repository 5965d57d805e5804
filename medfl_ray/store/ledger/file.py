"""The SQLite file of a hospital's ledger: opened safely, written durably, its faults in plain words."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from medfl_ray.errors import LedgerError
from medfl_ray.failpoints import failpoint
from medfl_ray.store import sqlite_files
from medfl_ray.store.ledger.events import LedgerEvent
from medfl_ray.store.private_files import claim_state_folder, make_private
from medfl_ray.store.signing_key import SigningKey, create_key, load_key
from medfl_ray.store.sqlite_files import LOCK_TIMEOUT_S, WRITES
from medfl_ray.store.tables import (
    APPEND_ONLY_TRIGGERS,
    LEDGER_APPLICATION_ID,
    LEDGER_READABLE_VERSIONS,
    LEDGER_SCHEMA_VERSION,
    ledger_events,
    ledger_metadata,
)

LEDGER_NAME = "ledger.sqlite"
KEY_NAME = "hospital.key"
DAMAGED = "it is damaged; restore it with `medfl-ray privacy ledger recover`"


class LedgerFile:
    """One hospital's ledger file; a connection lives for one operation, so that a fork never shares one."""

    def __init__(self, path: Path, lock_timeout_s: float = LOCK_TIMEOUT_S, recovering: bool = False) -> None:
        """Open the file, or make it and the hospital's key beside it, in a folder that is its owner's alone.

        A key without a ledger means that the ledger was lost; only recovery may then start a new one.

        Raises:
          LedgerError: the file or key is unreadable, foreign, of another version, or one of the two is gone.
        """
        self.path = path
        self._lock_timeout_s = lock_timeout_s
        self._may_create = True
        self._recovering = recovering
        self._shared: Connection | None = None
        self._engine = create_engine("sqlite://", creator=self._connect, poolclass=NullPool)
        event.listen(self._engine, "begin", sqlite_files.begin)
        self._prepare()
        self._may_create = False
        self.key = self._open_key()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read one consistent state."""
        if self._shared is not None:
            yield self._shared
            return
        with self._in_plain_words(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Hold the only write lock until the block ends: committed and on the disk, or not at all."""
        if self._shared is not None:
            yield self._shared
            return
        with self._in_plain_words(), self._engine.connect() as connection:
            connection.execution_options(**{WRITES: True})
            with connection.begin():
                yield connection

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all that is written inside the block, of any account of the file, become durable as one.

        Where the block or its end fails nothing of it was written, and what a `PrivacyLedger` has in memory may be
        ahead of the file: open the accounts anew.
        """
        with self.writing() as connection, self.through(connection):
            yield

    @contextmanager
    def through(self, connection: Connection) -> Iterator[None]:
        """Let everything inside the block go through one open connection."""
        self._shared = connection
        try:
            yield
        finally:
            self._shared = None

    def rows(self, connection: Connection, account: tuple[str, str], after: int = 0) -> list[LedgerEvent]:
        """Return an account's rows behind a sequence number, in order."""
        query = (
            select(ledger_events)
            .where(ledger_events.c.hospital == account[0], ledger_events.c.data_set == account[1])
            .where(ledger_events.c.sequence > after)
            .order_by(ledger_events.c.sequence)
        )
        return [LedgerEvent.from_mapping(dict(row)) for row in connection.execute(query).mappings()]

    def append(self, connection: Connection, row: LedgerEvent) -> None:
        """Write one row; it counts once the surrounding `writing` block ends."""
        if row.kind == "unprotected":
            _bring_up_to_date(connection)
        connection.execute(insert(ledger_events), row.to_dict())

    def accounts(self) -> list[tuple[str, str]]:
        """Return the (hospital, data set) pairs of the file."""
        query = select(ledger_events.c.hospital, ledger_events.c.data_set).distinct()
        with self.reading() as connection:
            return sorted((hospital, data_set) for hospital, data_set in connection.execute(query))

    def check_integrity(self) -> None:
        """Let SQLite check its pages and indices.

        Raises:
          LedgerError: the file is damaged.
        """
        with self.reading() as connection:
            answer = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
        if answer != "ok":
            raise _damaged(self.path.name)

    def _prepare(self) -> None:
        key_exists = self.path.with_name(KEY_NAME).exists() and not self._recovering
        if key_exists and not self.path.exists():
            raise LedgerError(
                f"the privacy ledger {self.path.name!r} is gone although the hospital's key is there: what was "
                "spent is unknown. Restore the file, or run `medfl-ray privacy ledger recover` with its mirror."
            )
        claim_state_folder(self.path.parent, holds_ledger=self.path.exists())
        with suppress(OSError):  # SQLite meets the same fault next, and has the words for it
            make_private(self.path)
        with self.writing() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            application = connection.exec_driver_sql("PRAGMA application_id").scalar()
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            if (version, application, tables) == (0, 0, 0) and not key_exists:
                self._create(connection)
            elif application != LEDGER_APPLICATION_ID:
                raise LedgerError(f"{self.path.name!r} is not a privacy ledger of medfl-ray; check the state folder")
            elif version not in LEDGER_READABLE_VERSIONS:
                raise LedgerError(
                    f"the privacy ledger {self.path.name!r} has version {version}; this program reads up to version "
                    f"{LEDGER_SCHEMA_VERSION}. Use the version of medfl-ray that wrote it, or a newer one."
                )
        failpoint("ledger.create.done")

    def _create(self, connection: Connection) -> None:
        failpoint("ledger.create.begin")
        _create_tables(connection)
        connection.exec_driver_sql(f"PRAGMA application_id = {LEDGER_APPLICATION_ID}")
        failpoint("ledger.create.before_commit")

    def _open_key(self) -> SigningKey:
        path = self.path.with_name(KEY_NAME)
        if path.exists():
            return load_key(path)
        if self.accounts():
            raise LedgerError(
                f"the hospital's key {KEY_NAME!r} is missing beside the ledger {self.path.name!r}; restore it from a "
                "backup, because without it no row can be checked or added"
            )
        key = create_key(path)
        failpoint("ledger.create.key")
        return key

    def _connect(self) -> sqlite3.Connection:
        # Made once and never again: a file that vanishes during a run must not come back empty.
        return sqlite_files.connect(self.path, self._may_create, self._lock_timeout_s)

    @contextmanager
    def _in_plain_words(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            raise _explained(self.path.name, error) from None
        except (UnicodeDecodeError, OverflowError):  # damaged pages hold text that is none
            raise _damaged(self.path.name) from None


def _explained(name: str, error: Exception) -> LedgerError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    damaged = any(mark in str(cause).lower() for mark in ("not a database", "malformed"))
    words = DAMAGED if damaged else sqlite_files.in_plain_words(cause or error)
    return LedgerError(f"the privacy ledger {name!r} cannot be used: {words}. Nothing was trained.")


def _damaged(name: str) -> LedgerError:
    return _explained(name, sqlite3.DatabaseError("malformed"))


def _create_tables(connection: Connection) -> None:
    ledger_metadata.create_all(connection)
    for trigger in APPEND_ONLY_TRIGGERS:
        connection.exec_driver_sql(trigger)
    connection.exec_driver_sql(f"PRAGMA user_version = {LEDGER_SCHEMA_VERSION}")


def _bring_up_to_date(connection: Connection) -> None:
    """Let a file of an earlier version take rows of every kind, within the transaction that writes the first of them.

    SQLite cannot change a table's check, so the rows move as they are into a table that has the new one.
    """
    if connection.exec_driver_sql("PRAGMA user_version").scalar() == LEDGER_SCHEMA_VERSION:
        return
    failpoint("ledger.upgrade.begin")
    earlier = f"{ledger_events.name}_earlier"
    for verb in ("update", "delete"):
        connection.exec_driver_sql(f"DROP TRIGGER {ledger_events.name}_no_{verb}")
    connection.exec_driver_sql(f"ALTER TABLE {ledger_events.name} RENAME TO {earlier}")
    _create_tables(connection)
    columns = ", ".join(column.name for column in ledger_events.columns)
    connection.exec_driver_sql(
        f"INSERT INTO {ledger_events.name} ({columns}) SELECT {columns} FROM {earlier} ORDER BY id"
    )
    connection.exec_driver_sql(f"DROP TABLE {earlier}")
    failpoint("ledger.upgrade.before_commit")
