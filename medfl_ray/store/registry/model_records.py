"""What the registry signs: the record of a version, and the row that says which version is champion."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfl_ray.errors import RegistryAltered, RegistryError
from medfl_ray.store.hash_chain import digest_of_text
from medfl_ray.store.registry.artifacts import Artifact
from medfl_ray.store.registry.lineage import Lineage
from medfl_ray.store.signing_key import SigningKey, signature_is_valid

VERSION_LABEL = "medfl-ray model version v1"
STATE_LABEL = "medfl-ray model stages v1"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ModelStage = Literal["candidate", "champion", "retired"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def text(self) -> str:
        """The one way to write it, which is what is hashed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


R = TypeVar("R", bound=_Record)


class VersionRecord(_Record):
    """A version: its files by their content, and where it comes from. Never changed."""

    format: Literal[1] = 1
    name: str
    version: int = Field(ge=1)
    at: str
    actor: str
    files: dict[str, Artifact]
    lineage: Lineage


class ModelState(_Record):
    """The stages of one model's versions.

    versions: how many there were ever, so that none is removed unseen. history: champions before this one, the newest
    last. withdrawn: those of the retired that somebody decided against; the others were replaced by another champion.
    audit: the row of the audit log that led here.
    """

    name: str
    versions: int = 0
    champion: int | None = None
    history: tuple[int, ...] = ()
    retired: tuple[int, ...] = ()
    withdrawn: tuple[int, ...] = ()
    audit: str = ""

    def stage(self, version: int) -> ModelStage:
        """Return a version's stage."""
        if version == self.champion:
            return "champion"
        return "retired" if version in self.retired else "candidate"

    def promoted(self, version: int) -> ModelState:
        """Return the stages with another champion; the one before is retired, and the next rollback's aim."""
        history = tuple(number for number in self.history if number != version)
        if self.champion is not None:
            history = (*history, self.champion)
        return self._with(version, history)

    def rolled_back(self) -> ModelState:
        """Return the stages with the champion before this one; this one is retired."""
        return self._with(self.history[-1], self.history[:-1])

    def without(self, version: int) -> ModelState:
        """Return the stages with a version withdrawn, to which no rollback comes back."""
        retired = tuple(sorted({*self.retired, version}))
        withdrawn = tuple(sorted({*self.withdrawn, version}))
        history = tuple(number for number in self.history if number != version)
        champion = None if version == self.champion else self.champion
        return self.model_copy(
            update={"champion": champion, "history": history, "retired": retired, "withdrawn": withdrawn}
        )

    def _with(self, champion: int, history: tuple[int, ...]) -> ModelState:
        before = () if self.champion is None else (self.champion,)
        retired = tuple(sorted({*self.retired, *before} - {champion}))
        withdrawn = tuple(number for number in self.withdrawn if number != champion)
        return self.model_copy(
            update={"champion": champion, "history": history, "retired": retired, "withdrawn": withdrawn}
        )


@dataclass(frozen=True)
class Sealed:
    """A record's text with its hash and the registry's signature, as a row holds it."""

    text: str
    hash: str
    signature: str

    @classmethod
    def of(cls, label: str, record: _Record, key: SigningKey) -> Sealed:
        """Seal a record."""
        digest = digest_of_text(label, record.text)
        return cls(record.text, digest, key.sign(digest))

    def opened(self, label: str, public_key: str, what: str) -> str:
        """Return the text.

        Raises:
          RegistryAltered: text, hash and signature do not belong together, or another key signed.
        """
        if digest_of_text(label, self.text) != self.hash:
            raise _altered(what, "its contents do not match its hash")
        if not signature_is_valid(public_key, self.hash, self.signature):
            raise _altered(what, f"it is not signed with the registry's key {public_key[:16]}...")
        return self.text


@dataclass(frozen=True)
class ModelVersion:
    """A checked version with its stage at the time it was read; `withdrawn` if it was retired by a decision."""

    record: VersionRecord
    stage: ModelStage
    seal: Sealed
    public_key: str
    withdrawn: bool = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.record.name

    @property
    def version(self) -> int:
        """The version's number, from 1."""
        return self.record.version

    @property
    def lineage(self) -> Lineage:
        """Where it comes from."""
        return self.record.lineage

    @property
    def files(self) -> dict[str, Artifact]:
        """The package's files."""
        return self.record.files

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.name}/{self.version}"

    def checked(self, public_key: str) -> ModelVersion:
        """Return the version as its sealed text has it.

        Raises:
          RegistryAltered: the text is not what the owner of the key signed.
        """
        record = read_version(self.seal, public_key, self.name, self.version)
        return ModelVersion(record, self.stage, self.seal, public_key, self.withdrawn)

    def as_document(self) -> dict[str, Any]:
        """Return what travels with a fetched package: the record, and with which key it is signed."""
        return {"record": self.seal.text, "hash": self.seal.hash, "signature": self.seal.signature,
                "public_key": self.public_key}  # fmt: skip


def read_version(seal: Sealed, public_key: str, name: str, version: int) -> VersionRecord:
    """Return a row's record, checked against its signature and its place.

    Raises:
      RegistryAltered: it was changed, signed by somebody else, or is the record of another version.
    """
    what = f"version {version} of {name!r}"
    record = _read(VersionRecord, seal.opened(VERSION_LABEL, public_key, what), what)
    if (record.name, record.version) != (name, version):
        raise _altered(what, f"it is the record of version {record.version} of {record.name!r}")
    return record


def read_state(seal: Sealed, public_key: str, name: str) -> ModelState:
    """Return a model's stages, checked against their signature.

    Raises:
      RegistryAltered: they were changed, signed by somebody else, or are another model's.
    """
    what = f"the row of stages of {name!r}"
    state = _read(ModelState, seal.opened(STATE_LABEL, public_key, what), what)
    if state.name != name:
        raise _altered(what, f"it belongs to {state.name!r}")
    return state


def read_document(document: Mapping[str, Any], public_key: str | None) -> VersionRecord:
    """Return the record that travels with a package.

    Args:
      public_key: the registry's, from a source other than the package; the document's own when absent.

    Raises:
      RegistryAltered: the document is damaged, or its signature is not that of the key.
    """
    try:
        seal = Sealed(str(document["record"]), str(document["hash"]), str(document["signature"]))
        key = public_key or str(document["public_key"])
    except KeyError:
        raise _altered("the record of this package", "parts of it are missing") from None
    what = "the record of this package"
    return _read(VersionRecord, seal.opened(VERSION_LABEL, key, what), what)


def checked_name(name: str) -> str:
    """Return a model's name.

    Raises:
      RegistryError: it cannot stand in a URL or a folder's name.
    """
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot be a model's name; use at most 64 lower-case letters, digits and . _ - , beginning with "
            "a letter or digit"
        )
    return name


def _read(kind: type[R], text: str, what: str) -> R:
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        raise RegistryError(f"{what} was written by another version of medfl-ray; use that one, or a newer") from None


def _altered(what: str, problem: str) -> RegistryAltered:
    return RegistryAltered(
        f"{what} was altered: {problem}. It is not used; find out who changed the registry, and restore its database "
        "from a backup"
    )
