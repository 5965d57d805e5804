"""The database of registry and audit log: an SQLite file, or PostgreSQL by URL; one writer at a time in both."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from medfl_ray.errors import RegistryError
from medfl_ray.failpoints import failpoint
from medfl_ray.store import sqlite_files
from medfl_ray.store.sqlite_files import LOCK_TIMEOUT_S, WRITES

SCHEMA_VERSION = "0001"
"""The newest migration; a test holds it to the files in store/migrations."""

VERSION_TABLE = "alembic_version"
POSTGRES_LOCK = 0x6D65646672617931
POSTGRES_SCHEMES = ("postgresql", "postgres")
CONNECT_TIMEOUT_S = 10


class Database:
    """Connections live for one operation, so that a fork never shares one; a URL's password is in no message."""

    def __init__(self, url: str, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Take `sqlite:///FILE` or `postgresql://...`; nothing is opened or made yet.

        Raises:
          RegistryError: the URL is neither, or the driver of PostgreSQL is not installed.
        """
        self._url = _parsed(url)
        self._lock_timeout_s = lock_timeout_s
        self._ready = False
        self.path = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._engine = self._sqlite_engine() if self.path is not None else self._postgres_engine()

    @property
    def name(self) -> str:
        """What messages call it: the file, or the kind of database; never the URL."""
        return repr(self.path.name) if self.path is not None else "in PostgreSQL"

    @property
    def exists(self) -> bool:
        """Whether anything was ever written: an SQLite file is made by the first writer."""
        return self.path is None or self.path.exists()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read one consistent state.

        Raises:
          RegistryError: the database cannot be reached or read, or another version of medfl-ray wrote it.
        """
        self._prepare()
        with self._in_plain_words(), self._engine.connect() as connection:
            if self.path is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Hold the only write lock until the block ends: committed and on the disk, or not at all.

        Raises:
          RegistryError: as for `reading`, or the disk is full.
        """
        self._prepare()
        with self._in_plain_words(), self._write() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            connection.execution_options(**{WRITES: True})
            with connection.begin():
                if self.path is None:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": POSTGRES_LOCK})
                yield connection

    def _prepare(self) -> None:
        """Bring the schema up to date, once per object; the lock keeps two processes from doing it together."""
        if self._ready:
            return
        with self._in_plain_words():
            if self.path is not None and not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._engine.connect() as connection:
                found = _schema_version(connection)
            if found != SCHEMA_VERSION:
                self._migrate()
        self._ready = True

    def _migrate(self) -> None:
        with self._write() as connection:
            found = _schema_version(connection)  # another process may have been first
            if found is not None and found > SCHEMA_VERSION:
                raise RegistryError(
                    f"the registry's database {self.name} has schema {found}; this program knows {SCHEMA_VERSION}. "
                    "Use the version of medfl-ray that wrote it, or a newer one"
                )
            if found != SCHEMA_VERSION:
                upgrade(connection)
            failpoint("registry.migrate.before_commit")

    def _sqlite_engine(self) -> Engine:
        engine = create_engine("sqlite://", creator=self._connect, poolclass=NullPool)
        event.listen(engine, "begin", sqlite_files.begin)
        return engine

    def _connect(self) -> sqlite3.Connection:
        assert self.path is not None
        # Made once and never again: a file that vanishes under a running service must not come back empty.
        return sqlite_files.connect(self.path, not self._ready, self._lock_timeout_s)

    def _postgres_engine(self) -> Engine:
        try:
            timeout_ms = int(1000 * self._lock_timeout_s)
            arguments = {"connect_timeout": CONNECT_TIMEOUT_S, "options": f"-c lock_timeout={timeout_ms}"}
            return create_engine(self._url, poolclass=NullPool, connect_args=arguments)
        except ModuleNotFoundError:
            raise RegistryError(
                "a registry in PostgreSQL needs the driver psycopg; install medfl-ray with the extra: "
                "pip install 'medfl-ray[postgres]'"
            ) from None

    @contextmanager
    def _in_plain_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(f"{error.strerror}; check its folder") from None
        except (DBAPIError, sqlite3.Error) as error:
            cause = (error.orig if isinstance(error, DBAPIError) else error) or error
            raise self._unusable(self._explained(cause)) from None
        except (UnicodeDecodeError, OverflowError):  # damaged pages hold text that is none
            raise self._unusable("it is damaged; restore it from a backup") from None

    def _explained(self, cause: BaseException) -> str:
        words = str(cause).lower()
        if self.path is not None:
            damaged = any(mark in words for mark in ("not a database", "malformed"))
            return "it is damaged; restore it from a backup" if damaged else sqlite_files.in_plain_words(cause)
        if "lock timeout" in words:
            return "another process holds it; wait for that process to end"
        if "append-only" in words:
            return "its rows are never changed or deleted"
        if "authentication" in words or "does not exist" in words:
            return "the server refuses the user, the password or the database's name; check the URL"
        # What the server says may hold its address and its user, so the kind of error has to do.
        return f"PostgreSQL fails with {type(cause).__name__}; check the URL, and that the server runs"

    def _unusable(self, why: str) -> RegistryError:
        return RegistryError(f"the registry's database {self.name} cannot be used: {why}. Nothing was changed")


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version inside the connection's open transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _schema_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return None if version is None else str(version)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        raise _no_such_database() from None
    if backend in POSTGRES_SCHEMES:
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise _no_such_database()


def _no_such_database() -> RegistryError:
    return RegistryError(
        "the URL of the registry's database is not one of sqlite:///FILE and postgresql://USER@HOST/NAME; correct "
        "--database or MEDFL_REGISTRY_DATABASE"
    )
