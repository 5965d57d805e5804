"""The model registry: versions with their lineage, one champion per model, and a signed record of who decided what.

Files lie under their SHA-256 (artifacts.py); records and stages are rows of a database, each signed, each change
together with its row of the audit log in one transaction. Whoever can write the database and not the key can break the
registry; a version or champion of their own is refused. See docs/howto/registry.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from medfl_ray.errors import PromotionRefused, RegistryError
from medfl_ray.failpoints import failpoint
from medfl_ray.store.registry import audit_log as audit
from medfl_ray.store.registry.artifacts import ArtifactStore
from medfl_ray.store.registry.audit_log import Action, AuditEvent, Chain, LastSeen, acting_user, checked_reason
from medfl_ray.store.registry.database import Database
from medfl_ray.store.registry.key import RegistryKey
from medfl_ray.store.registry.lineage import Lineage, is_better
from medfl_ray.store.registry.model_records import (
    VERSION_LABEL,
    ModelState,
    ModelVersion,
    Sealed,
    VersionRecord,
    checked_name,
)
from medfl_ray.store.registry.package_files import fetch_into, keep_package
from medfl_ray.store.registry.promotion import Gate, PromotionDecision, decide
from medfl_ray.store.registry.rows import Alias, ReadRows, WriteRows
from medfl_ray.store.state_folders import state_root

DATABASE_NAME = "registry.sqlite"
T = TypeVar("T")


class Registry:
    """One registry; every operation opens the database anew, so that objects may be shared and forked."""

    def __init__(
        self,
        root: str | Path | None = None,
        database: str | None = None,
        key_folder: Path | None = None,
        public_key: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a registry's place; nothing is made before the first version.

        Args:
          root: folder or URL of the files; MEDFL_REGISTRY when absent, else `registry` in the user's state folder.
          database: URL; MEDFL_REGISTRY_DATABASE when absent, else an SQLite file in a local root.
          key_folder: where `registry.key` lies; a local root itself when absent, else the user's state folder.
          public_key: the registry's, 64 hex digits, for a machine without the key; MEDFL_REGISTRY_PUBLIC_KEY.
          options: for fsspec's file system.

        Raises:
          RegistryError: a URL is wrong, or files on a server have no database.
        """
        place = str(root or os.environ.get("MEDFL_REGISTRY") or state_root() / "registry")
        self._artifacts = ArtifactStore(place, options)
        local = self._artifacts.local_folder
        url = database or os.environ.get("MEDFL_REGISTRY_DATABASE")
        if url is None and local is None:
            raise RegistryError(
                "a registry whose files are on a server needs a database of its own: give --database or "
                "MEDFL_REGISTRY_DATABASE, postgresql://... or sqlite:///FILE"
            )
        self._database = Database(url or f"sqlite:///{(local or Path()) / DATABASE_NAME}")
        folder = key_folder or local or state_root() / "registry"
        self._key = RegistryKey(folder, public_key or os.environ.get("MEDFL_REGISTRY_PUBLIC_KEY"))
        self._seen = LastSeen(folder)
        self._chain = Chain()

    @property
    def public_key(self) -> str:
        """The key under which everything here is signed, 64 hex digits."""
        return self._key.public_key

    def register(self, name: str, package_dir: Path, lineage: Lineage, actor: str | None = None) -> ModelVersion:
        """Keep a package as the next version of a model, as candidate.

        Raises:
          RegistryError: the package is incomplete or inconsistent, or the registry cannot be written.
        """
        checked_name(name)
        who = acting_user(actor)
        files = keep_package(self._artifacts, package_dir)
        failpoint("registry.register.files")

        def change(rows: WriteRows) -> ModelVersion:
            state = rows.state(name) or ModelState(name=name)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            number = state.versions + 1
            record = VersionRecord(name=name, version=number, at=now, actor=who, files=files, lineage=lineage)
            seal = Sealed.of(VERSION_LABEL, record, rows.key)
            rows.add_version(record, seal)
            failpoint("registry.register.version")
            details = {"version": number, "record": seal.hash}
            rows.change(state.model_copy(update={"versions": number}), Action(who, "model.register", name, details))
            return ModelVersion(record, "candidate", seal, rows.public_key)

        return self._write(change)

    def names(self) -> list[str]:
        """Return the models' names."""
        return self._read(lambda rows: rows.names(), [])

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return the versions of one model or of all, oldest first, each checked.

        Raises:
          RegistryAltered: a record or a row of stages is not what the registry signed.
        """
        return self._read(lambda rows: rows.versions(name), [])

    def get(self, name: str, version: int | Alias | str = "champion") -> ModelVersion:
        """Return a version by its number, or the newest of a stage: candidate, champion or retired.

        Raises:
          RegistryAltered: its record, or the row that says which version is champion, is not what was signed.
          RegistryError: there is none.
        """
        found = self._read(lambda rows: rows.find(name, version), None)
        if found is None:
            raise RegistryError(f"the registry has no model {name!r}; see medfl-ray models list")
        return found

    def fetch(self, version: ModelVersion, into: Path) -> Path:
        """Make `into` a package folder: the record's signature and every file's SHA-256 are checked.

        Raises:
          RegistryAltered: the record is not what the registry signed.
          ArtifactDamaged: a file is not what was registered; then nothing is left in `into`.
        """
        return fetch_into(self._artifacts, version.checked(self.public_key), into)

    def promote(
        self,
        name: str,
        version: int | str,
        actor: str | None = None,
        gate: Gate | None = None,
        override: str | None = None,
    ) -> PromotionDecision:
        """Make a version champion if the gate lets it, judged against the champion of that very moment.

        Args:
          override: a reason, which is kept for good, to promote a version that the gate refuses, or a retired one.
            Signatures and SHA-256 are never overridden.

        Raises:
          PromotionRefused: the gate does not let it; this is audited too.
          RegistryError: there is no such version, or it is champion already.
        """
        who, reason = acting_user(actor), None if override is None else checked_reason(override)
        asked = gate or Gate()
        chosen = self.get(name, version)
        self.check_files(chosen)

        def change(rows: WriteRows) -> PromotionDecision:
            now, state = rows.get(name, chosen.version)
            if now.stage == "champion":
                raise RegistryError(f"{now} is champion already")
            before = None if state.champion is None else rows.get(name, state.champion)[0].lineage
            decision = decide(now.lineage, before, asked, withdrawn=now.stage == "retired")
            details = {"version": now.version, "from": state.champion, **decision.as_details(asked)}
            if decision.allowed:
                rows.change(state.promoted(now.version), Action(who, "model.promote", name, details))
            elif reason is not None:
                details |= {"override": reason}
                rows.change(state.promoted(now.version), Action(who, "model.promote", name, details))
            else:
                rows.append(Action(who, "model.refuse", name, details))
            return decision

        decision = self._write(change)
        if not decision.allowed and reason is None:
            raise PromotionRefused(f"{chosen} was not promoted: {decision.objections}")
        return decision

    def rollback(self, name: str, actor: str | None = None, reason: str | None = None) -> ModelVersion:
        """Make the champion before this one champion again; its files are checked first.

        Raises:
          RegistryError: there is none before, or its files are damaged.
        """
        who = acting_user(actor)
        details = {} if reason is None else {"reason": checked_reason(reason)}
        aim = self._read(lambda rows: rows.before_champion(name), None)
        if aim is None:
            raise RegistryError(f"model {name!r} has no earlier champion to go back to; promote another version")
        self.check_files(aim)

        def change(rows: WriteRows) -> ModelVersion:
            now, state = rows.get(name, aim.version)
            if state.history[-1:] != (now.version,):
                raise RegistryError(
                    f"the champion of {name!r} has just been changed by somebody else; look, and try again"
                )
            what = {"version": now.version, "from": state.champion, **details}
            rows.change(state.rolled_back(), Action(who, "model.rollback", name, what))
            return replace(now, stage="champion")

        return self._write(change)

    def retire(
        self, name: str, version: int | str, reason: str, actor: str | None = None, leave_none: bool = False
    ) -> ModelVersion:
        """Withdraw a version: no rollback comes back to it, and promoting it needs an override.

        Args:
          leave_none: withdraw even the champion, so that the model has none.

        Raises:
          RegistryError: it is the champion and `leave_none` is not set, or is withdrawn already.
        """
        who, why = acting_user(actor), checked_reason(reason)

        def change(rows: WriteRows) -> ModelVersion:
            found, state = rows.get(name, version)
            if found.stage == "champion" and not leave_none:
                raise RegistryError(
                    f"{found} is the champion; promote another version or roll back first, or say --leave-none to "
                    "leave the model without one"
                )
            after = state.without(found.version)
            if after == state:
                raise RegistryError(f"{found} is retired already")
            what = {"version": found.version, "from": found.stage, "reason": why}
            rows.change(after, Action(who, "model.retire", name, what))
            return replace(found, stage="retired", withdrawn=True)

        return self._write(change)

    def get_best(self, metric: str = "dice", task: str | None = None) -> ModelVersion:
        """Return the version, not retired, with the best shown mean of a metric; the newest of equals.

        Figures of different images are compared as they stand: `lineage.metrics_of` says of which they are.

        Raises:
          RegistryError: no version shows the metric.
        """
        fitting = [v for v in self.versions() if v.stage != "retired" and task in (None, v.lineage.task)]
        best: ModelVersion | None = None
        for version in fitting:
            value, leading = _value(version, metric), None if best is None else _value(best, metric)
            if value is not None and (leading is None or not is_better(metric, leading, value)):
                best = version
        if best is None:
            hidden = sum(metric in version.lineage.metrics for version in fitting)
            raise RegistryError(
                f"none of {len(fitting)} versions{f' for {task}' if task else ''} shows {metric!r}"
                f"{f'; {hidden} keep it suppressed' if hidden else ''}. Evaluate one on public images: medfl-ray "
                "models register RUN --evaluation FILE"
            )
        return best

    def check_files(self, version: ModelVersion) -> None:
        """Read a version's files through.

        Raises:
          ArtifactDamaged: one is gone or was changed.
        """
        for artifact in version.files.values():
            self._artifacts.check(artifact)

    def audit(self, name: str | None = None) -> list[AuditEvent]:
        """Return the audit log, checked from its first row, of one model or of all.

        Raises:
          RegistryAltered: names the first bad row.
        """

        log: list[AuditEvent] = self._read(lambda rows: rows.checked_log(), [])
        return [row for row in log if name in (None, row.subject)]

    def verify(self) -> tuple[int, int]:
        """Check everything: the audit log's chain, all records and stages against it, and all files.

        Returns:
          Rows of the audit log, and versions.

        Raises:
          RegistryAltered, ArtifactDamaged: names the first thing that is wrong.
        """

        nothing: tuple[list[AuditEvent], list[ModelVersion]] = ([], [])
        log, versions = self._read(lambda rows: (rows.checked_log(), rows.checked_versions()), nothing)
        for artifact in {artifact for version in versions for artifact in version.files.values()}:
            self._artifacts.check(artifact)
        return len(log), len(versions)

    def _read(self, read: Callable[[ReadRows], T], nothing: T) -> T:
        if not self._database.exists:
            self._must_be_new()
            return nothing
        with self._database.reading() as connection:
            self._seen.check(connection)
            self._chain.must_hold(connection)
            if audit.is_empty(connection):
                return nothing
            head = self._chain.check(connection, self.public_key)
            answer = read(ReadRows(connection, self.public_key))
        self._seen.note_if_possible(head)
        return answer

    def _must_be_new(self) -> None:
        """Refuse to take a database that is gone for one that was never made: its disk may be unmounted."""
        sequence = max(self._chain.last.sequence, self._seen.sequence)
        if sequence:
            raise RegistryError(
                f"the registry's database {self._database.name} is not there, but row {sequence} of its audit log was "
                "seen: its disk is not mounted, or it was removed. Mount the disk, or restore it from a backup"
            )

    def _write(self, change: Callable[[WriteRows], T]) -> T:
        with self._database.writing() as connection:
            self._seen.check(connection)
            key = self._key.for_writing(is_new=audit.is_empty(connection))
            rows = WriteRows(connection, key, self._chain.check(connection, key.public_key))
            answer = change(rows)
            failpoint("registry.change.before_commit")
        failpoint("registry.change.committed")
        self._seen.note(rows.head)
        return answer


def _value(version: ModelVersion, metric: str) -> float | None:
    figure = version.lineage.metrics.get(metric)
    return None if figure is None else figure.value
