"""The registry's rows inside one transaction, each checked as it is read; what is written is signed and audited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from sqlalchemy import Connection, delete, insert, select

from medfl_ray.errors import RegistryAltered, RegistryError
from medfl_ray.failpoints import failpoint
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.registry import audit_log as audit
from medfl_ray.store.registry.audit_log import Action, AuditEvent
from medfl_ray.store.registry.model_records import (
    STATE_LABEL,
    ModelState,
    ModelVersion,
    Sealed,
    VersionRecord,
    read_state,
    read_version,
)
from medfl_ray.store.signing_key import SigningKey
from medfl_ray.store.tables import audit_log, model_stages, model_versions

CHANGES = ("model.register", "model.promote", "model.rollback", "model.retire")
Alias = Literal["candidate", "champion", "retired"]


class ReadRows:
    """Versions and stages as one transaction sees them; the audit log must have been checked in it."""

    def __init__(self, connection: Connection, public_key: str) -> None:
        """Take an open transaction and the registry's key."""
        self._connection = connection
        self.public_key = public_key

    def names(self) -> list[str]:
        """Return the models' names."""
        return list(self._connection.scalars(select(model_stages.c.name).order_by(model_stages.c.name)))

    def state(self, name: str) -> ModelState | None:
        """Return a model's stages; None where there is no such model.

        Raises:
          RegistryAltered: the row was changed, or is an old one: a later change stands in the audit log.
        """
        chosen = select(model_stages).where(model_stages.c.name == name)
        row = self._connection.execute(chosen).mappings().first()
        last = self._last_change(name)
        if row is None and last is None:
            return None
        if row is None or last is None:
            raise self._contradiction(name, "is gone" if row is None else "is not in the audit log")
        state = read_state(Sealed(row["state"], row["hash"], row["signature"]), self.public_key, name)
        if state.audit != str(last):
            raise self._contradiction(name, "is an old one")
        return state

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return the versions of one model or of all, oldest first."""
        return [
            self._version(state, number)
            for state in map(self.state, self.names() if name is None else [name])
            if state is not None
            for number in range(1, state.versions + 1)
        ]

    def find(self, name: str, version: int | str) -> ModelVersion | None:
        """Return a version by number or stage; None where there is no such model.

        Raises:
          RegistryError: the model has no such version.
        """
        state = self.state(name)
        if state is None:
            return None
        number = _number(state, version)
        if number is None or not 1 <= number <= state.versions:
            stages = ", ".join(get_args(Alias))
            raise RegistryError(
                f"model {name!r} has no version {version!r}; it has versions 1 to {state.versions}, and stages "
                f"are {stages}"
            )
        return self._version(state, number)

    def get(self, name: str, version: int | str) -> tuple[ModelVersion, ModelState]:
        """Return a version and the stages of its model.

        Raises:
          RegistryError: there is no such model or version.
        """
        found, state = self.find(name, version), self.state(name)
        if found is None or state is None:
            raise RegistryError(f"the registry has no model {name!r}; see medfl-ray models list")
        return found, state

    def before_champion(self, name: str) -> ModelVersion | None:
        """Return the champion before this one, or None."""
        state = self.state(name)
        return self._version(state, state.history[-1]) if state is not None and state.history else None

    def checked_log(self) -> list[AuditEvent]:
        """Return the whole audit log, checked from its first row.

        Raises:
          RegistryAltered: names the first bad row.
        """
        rows = audit.events(self._connection)
        audit.verify(rows, self.public_key)
        return rows

    def checked_versions(self) -> list[ModelVersion]:
        """Return all versions; stages and records must be what the audit log leads to.

        Raises:
          RegistryAltered: they are not.
        """
        log = self.checked_log()
        replayed = _replayed(log)
        for name in sorted(replayed.keys() | set(self.names())):
            if self.state(name) != replayed.get(name):
                raise self._contradiction(name, "is not what the audit log leads to")
        versions = self.versions()
        sealed = {(version.name, version.version): version.seal.hash for version in versions}
        for row in log:
            if row.action == CHANGES[0] and sealed[row.subject, row.details["version"]] != row.details["record"]:
                raise self._contradiction(row.subject, f"names another version {row.details['version']}")
        return versions

    def _version(self, state: ModelState, number: int) -> ModelVersion:
        table = model_versions.c
        chosen = select(model_versions).where(table.name == state.name, table.version == number)
        row = self._connection.execute(chosen).mappings().first()
        if row is None:
            raise self._contradiction(state.name, f"names version {number}, which was removed")
        seal = Sealed(row["record"], row["hash"], row["signature"])
        record = read_version(seal, self.public_key, state.name, number)
        return ModelVersion(record, state.stage(number), seal, self.public_key, number in state.withdrawn)

    def _last_change(self, name: str) -> LedgerHead | None:
        table = audit_log.c
        chosen = select(table.sequence, table.hash).where(table.subject == name, table.action.in_(CHANGES))
        row = self._connection.execute(chosen.order_by(table.sequence.desc()).limit(1)).first()
        return None if row is None else LedgerHead(row.sequence, row.hash)

    def _contradiction(self, name: str, what: str) -> RegistryAltered:
        return RegistryAltered(
            f"the row of stages of {name!r} {what}: the registry's database was altered. It is not used; restore it "
            "from a backup"
        )


class WriteRows(ReadRows):
    """The same inside the one write transaction, with the key."""

    def __init__(self, connection: Connection, key: SigningKey, head: LedgerHead) -> None:
        """Take an open write transaction and the checked last row of the audit log."""
        super().__init__(connection, key.public_key)
        self.key = key
        self.head = head

    def add_version(self, record: VersionRecord, seal: Sealed) -> None:
        """Write a version's row."""
        row = {"record": seal.text, "hash": seal.hash, "signature": seal.signature}
        self._connection.execute(insert(model_versions), {"name": record.name, "version": record.version, **row})

    def append(self, action: Action) -> None:
        """Write a row of the audit log."""
        self.head = audit.append(self._connection, self.key, self.head, action).head

    def change(self, state: ModelState, action: Action) -> None:
        """Write a model's new stages and the row of the audit log that explains them."""
        self.append(action)
        failpoint("registry.change.audited")
        sealed = Sealed.of(STATE_LABEL, state.model_copy(update={"audit": str(self.head)}), self.key)
        self._connection.execute(delete(model_stages).where(model_stages.c.name == state.name))
        failpoint("registry.change.between")
        row = {"state": sealed.text, "hash": sealed.hash, "signature": sealed.signature}
        self._connection.execute(insert(model_stages), {"name": state.name, **row})


def _number(state: ModelState, version: int | str) -> int | None:
    """Return the number that is meant; the newest of a stage."""
    if isinstance(version, int) or version.isdecimal():
        return int(version)
    if version == "champion":
        return state.champion
    fitting: list[int] = [n for n in range(1, state.versions + 1) if state.stage(n) == version]
    return fitting[-1] if fitting else None


def _replayed(log: Sequence[AuditEvent]) -> dict[str, ModelState]:
    """Return the stages that a checked log leads to."""
    states: dict[str, ModelState] = {}
    for row in log:
        state = states.get(row.subject, ModelState(name=row.subject))
        number = row.details.get("version", 0)
        if row.action == "model.register":
            state = state.model_copy(update={"versions": number})
        elif row.action == "model.promote":
            state = state.promoted(number)
        elif row.action == "model.rollback":
            state = state.rolled_back()
        elif row.action == "model.retire":
            state = state.without(number)
        else:
            continue
        states[row.subject] = state.model_copy(update={"audit": str(row.head)})
    return states
