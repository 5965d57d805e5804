"""Who did what to which subject, and when: append-only, each row bound to the one before it and signed.

The rows hold no patient identifier: an actor is an account or a role, a subject is a model, details are what the
program knows of the action and a reason that somebody gave. Whoever removes rows from the end leaves a chain that is
whole; therefore each machine remembers the last row that it has seen, in a file beside the key.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, insert, select

from medfl_ray.errors import LedgerError, RegistryAltered, RegistryError
from medfl_ray.store.durable import sync_folder
from medfl_ray.store.hash_chain import digest_of, link_problem
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.signing_key import SigningKey
from medfl_ray.store.tables import audit_log

AUDIT_LABEL = "medfl-ray audit log v1"
FIRST = LedgerHead(0, "0" * 64)
SEEN_NAME = "audit.seen"
ACTOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
MAX_REASON = 500
_log = logging.getLogger(__name__)


class AuditEvent(BaseModel):
    """One row."""

    model_config = ConfigDict(frozen=True)

    sequence: int
    at: str
    actor: str
    action: str
    subject: str
    details: dict[str, Any]
    previous_hash: str
    hash: str = ""
    signature: str = ""

    def digest(self) -> str:
        """SHA-256 over every other field, the hash of the row before included."""
        return digest_of(AUDIT_LABEL, self.model_dump(exclude={"hash", "signature"}))

    @property
    def head(self) -> LedgerHead:
        """The row as the head of the log that ends with it."""
        return LedgerHead(self.sequence, self.hash)


class Action(NamedTuple):
    """What is to be recorded."""

    actor: str
    name: str
    subject: str
    details: Mapping[str, Any]


def append(connection: Connection, key: SigningKey, head: LedgerHead, action: Action) -> AuditEvent:
    """Write the row behind a checked head; it counts once the surrounding transaction ends."""
    unsigned = AuditEvent(
        sequence=head.sequence + 1,
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        actor=action.actor,
        action=action.name,
        subject=action.subject,
        details=dict(action.details),
        previous_hash=head.hash,
    )
    digest = unsigned.digest()
    event = unsigned.model_copy(update={"hash": digest, "signature": key.sign(digest)})
    connection.execute(insert(audit_log), {**event.model_dump(), "details": json.dumps(event.details, sort_keys=True)})
    return event


def is_empty(connection: Connection) -> bool:
    """Say whether nothing was ever recorded."""
    return connection.execute(select(audit_log.c.sequence).limit(1)).first() is None


def event_at(connection: Connection, sequence: int) -> AuditEvent | None:
    """Return one row, or None where there is none."""
    row = connection.execute(select(audit_log).where(audit_log.c.sequence == sequence)).mappings().first()
    return None if row is None else _event(dict(row))


def events(connection: Connection, after: int = 0) -> list[AuditEvent]:
    """Return the rows behind a number, in order; unchecked, see `verify`."""
    query = select(audit_log).where(audit_log.c.sequence > after).order_by(audit_log.c.sequence)
    return [_event(dict(row)) for row in connection.execute(query).mappings()]


def verify(rows: Sequence[AuditEvent], public_key: str, head: LedgerHead = FIRST) -> LedgerHead:
    """Check that rows follow a head and one another, unaltered and signed; return the last.

    Raises:
      RegistryAltered: names the first row that is wrong, and in what.
    """
    for row in rows:
        problem = link_problem(
            row, head.sequence, head.hash, public_key, f"that of the registry's key {public_key[:16]}..."
        )
        if problem:
            raise RegistryAltered(
                f"row {head.sequence + 1} of the audit log is bad: {problem}. Nothing is promoted or served from this "
                "registry until its database is restored from a backup"
            )
        head = row.head
    return head


class Chain:
    """The log as this process knows it: each row is checked once, and the last must still be there afterwards."""

    def __init__(self) -> None:
        """Start with nothing checked."""
        self._checked = FIRST

    @property
    def last(self) -> LedgerHead:
        """The last row that was checked."""
        return self._checked

    def must_hold(self, connection: Connection) -> None:
        """Find a log that was emptied, cut off or exchanged since.

        Raises:
          RegistryAltered: the last row that was checked is gone or another one.
        """
        _must_hold(connection, self._checked, "this process")

    def check(self, connection: Connection, public_key: str) -> LedgerHead:
        """Check the rows that came since, and return the last.

        Raises:
          RegistryAltered: names the first bad row, or says that rows are gone.
        """
        self.must_hold(connection)
        known = self._checked
        self._checked = verify(events(connection, known.sequence), public_key, known)
        return self._checked


class LastSeen:
    """The last row of the log that this machine has seen; no signature, because it only ever refuses."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of the registry's key; the file is written with the first row."""
        self._path = folder / SEEN_NAME
        self._told = False

    @property
    def sequence(self) -> int:
        """The number of that row; 0 where this machine has seen none."""
        seen = self._read()
        return 0 if seen is None else seen.sequence

    def check(self, connection: Connection) -> None:
        """Find a log that was cut off or exchanged since.

        Raises:
          RegistryAltered: the row is gone or another one.
        """
        seen = self._read()
        if seen is None:
            return
        _must_hold(
            connection, seen, "this machine", f", or remove {SEEN_NAME!r} beside the registry's key if it is to stand"
        )

    def note(self, head: LedgerHead) -> None:
        """Remember a row that was committed. A crash before this, or two writers at once, leave an earlier one."""
        try:
            self._note(head)
        except OSError as error:
            raise RegistryError(
                f"{SEEN_NAME!r} cannot be written ({error.strerror}); what was asked for is done and recorded. Free "
                "space, or check the permissions of the folder of the registry's key"
            ) from None

    def note_if_possible(self, head: LedgerHead) -> None:
        """Remember a row that was read; where the folder cannot be written, reading goes on, and the log says so."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._note(head)
        except OSError as error:
            level = logging.DEBUG if self._told else logging.WARNING
            _log.log(
                level,
                "%s cannot be written (%s): an old copy may pass later",
                SEEN_NAME,
                error.strerror,
            )
            self._told = True

    def _note(self, head: LedgerHead) -> None:
        if self.sequence >= head.sequence:
            return
        descriptor, temporary = tempfile.mkstemp(prefix=f".{SEEN_NAME}.", dir=self._path.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(str(head))
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(self._path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(self._path.parent)

    def _read(self) -> LedgerHead | None:
        try:
            return LedgerHead.parse(self._path.read_text().strip())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError, LedgerError):
            raise RegistryError(
                f"{SEEN_NAME!r} beside the registry's key cannot be read, so that a log that was cut off would not be "
                "found; restore it, or remove it if the registry's present state is right"
            ) from None


def acting_user(given: str | None = None) -> str:
    """Return the name that is recorded as the actor: the one given, else the account of the operating system.

    Raises:
      RegistryError: it is no account's name; free text could hold anything.
    """
    if given is None:
        try:
            given = getpass.getuser()
        except (OSError, KeyError):  # a container may run under a number without a name
            given = f"uid-{os.getuid()}"
    if not ACTOR.fullmatch(given):
        raise RegistryError(
            "the actor is not the name of an account; expected at most 64 letters, digits and . _ @ - , give it with "
            "--actor"
        )
    return given


def checked_reason(reason: str) -> str:
    """Return a reason as it is recorded.

    Raises:
      RegistryError: it is empty, too long, or more than one line.
    """
    plain = reason.strip()
    if not plain or len(plain) > MAX_REASON or not plain.isprintable():
        raise RegistryError(
            f"the reason is empty, not one line, or longer than {MAX_REASON} characters; say in a sentence why, and "
            "name no patient: it is kept for good"
        )
    return plain


def _event(row: Mapping[str, Any]) -> AuditEvent:
    try:
        details = json.loads(row["details"])
    except (TypeError, ValueError):
        details = {"unreadable": repr(row["details"])}
    fields = {**row, "details": details if isinstance(details, dict) else {"unreadable": repr(details)}}
    return AuditEvent.model_construct(**fields)


def _must_hold(connection: Connection, seen: LedgerHead, who: str, otherwise: str = "") -> None:
    event = event_at(connection, seen.sequence) if seen.sequence else None
    if seen.sequence and (event is None or event.hash != seen.hash):
        raise RegistryAltered(
            f"the audit log no longer holds row {seen.sequence}, which {who} has seen: rows were removed, or an old "
            f"copy of the database was put in its place. Find out why, and restore the newest state{otherwise}"
        )
