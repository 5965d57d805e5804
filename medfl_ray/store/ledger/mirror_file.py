"""The SQLite file of a coordinator's mirror and the coordinator's key beside it: opened safely, written durably."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from medfl_ray.errors import LedgerError
from medfl_ray.store.private_files import make_private
from medfl_ray.store.signing_key import SigningKey, create_key, load_key
from medfl_ray.store.sqlite_files import LOCK_TIMEOUT_S, set_journal

MIRROR_NAME = "mirror.sqlite"
COORDINATOR_KEY_NAME = "coordinator.key"
TABLES = (
    """CREATE TABLE IF NOT EXISTS heads (
      hospital TEXT, data_set TEXT, generation INTEGER, sequence INTEGER, hash TEXT, public_key TEXT, signature TEXT,
      PRIMARY KEY (hospital, data_set)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS events (
      hospital TEXT, data_set TEXT, generation INTEGER, sequence INTEGER, hash TEXT, body TEXT,
      PRIMARY KEY (hospital, data_set, generation, sequence)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS keys (
      hospital TEXT, data_set TEXT, number INTEGER, public_key TEXT, signature TEXT,
      PRIMARY KEY (hospital, data_set, number)) WITHOUT ROWID""",
)


class MirrorFile:
    """One mirror's file in its folder; a connection lives for one operation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_private = False

    @property
    def exists(self) -> bool:
        """Whether anything was ever kept."""
        return self._path.exists()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read; nothing is made that is not there.

        Raises:
          LedgerError: the file cannot be read.
        """
        with _in_plain_words(), closing(self._connect()) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Hold the only write lock until the block ends: on the disk, or not at all.

        Raises:
          LedgerError: the file cannot be written.
        """
        with _in_plain_words():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._is_private:
                make_private(self._path)
                self._is_private = True
            with closing(self._connect()) as connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")

    def key(self, connection: sqlite3.Connection) -> SigningKey:
        """Return the coordinator's key; a new one where the mirror has signed nothing yet.

        Raises:
          LedgerError: the key is missing or cannot be read.
        """
        path = self.folder / COORDINATOR_KEY_NAME
        if path.exists():
            return load_key(path)
        count = "SELECT (SELECT count(*) FROM heads) + (SELECT count(*) FROM keys)"
        if connection.execute(count).fetchone()[0]:
            raise LedgerError(
                f"the coordinator's key {COORDINATOR_KEY_NAME!r} is missing beside its mirror {MIRROR_NAME!r}; restore "
                "it from a backup, because without it the mirror cannot be checked"
            )
        return create_key(path)

    @property
    def _path(self) -> Path:
        return self.folder / MIRROR_NAME

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        set_journal(connection, self._path)
        connection.execute("PRAGMA synchronous = FULL")
        for table in TABLES:
            connection.execute(table)
        return connection


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
