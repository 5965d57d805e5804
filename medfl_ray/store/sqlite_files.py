"""SQLite files that survive a power cut: opened safely, every commit on the disk, one writer at a time."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from sqlalchemy import Connection

from medfl_ray.store.file_systems import is_on_network

LOCK_TIMEOUT_S = 30.0
WRITES = "medfl_writes"
PLAIN_WORDS = (
    ("locked", "another process holds it; wait for that process to end, or end it"),
    ("full", "the disk is full; free space"),
    ("disk i/o", "the disk reports an error; check it before anything else"),
    ("readonly", "it cannot be written; check the permissions of the state folder"),
    ("unable to open", "it cannot be opened; check that the state folder exists and may be written"),
    ("append-only", "its rows are never changed or deleted"),
)


def connect(path: Path, may_create: bool, timeout_s: float = LOCK_TIMEOUT_S) -> sqlite3.Connection:
    """Open a file; without `may_create` one that is gone does not come back empty."""
    mode = "rwc" if may_create else "rw"
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=timeout_s, isolation_level=None)
    set_journal(connection, path, timeout_s)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def begin(connection: Connection) -> None:
    """Begin a transaction: at once with the write lock where the option WRITES is set, else when something is read."""
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def in_plain_words(error: BaseException) -> str:
    """Say what SQLite has against a file, and what to do."""
    text = str(error)
    return next((words for mark, words in PLAIN_WORDS if mark in text.lower()), f"SQLite says: {text}")


def set_journal(connection: sqlite3.Connection, path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> None:
    """Switch to write-ahead logging; SQLite does not wait for this lock by itself where two processes make a file.

    On a network file system the journal is rolled back instead: write-ahead logging keeps its index in memory that all
    readers and writers share, which two machines do not have. Each would see its own index, and the rows that the
    other has charged would be overwritten. See https://sqlite.org/wal.html, "all processes ... on the same host".
    """
    mode = "DELETE" if is_on_network(path.absolute().parent) else "WAL"
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode = {mode}")
        except sqlite3.Error as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                connection.close()
                raise
            time.sleep(0.01)
        else:
            return
