"""A model's package as files: which of a folder's belong to it, and whether a fetched folder is what was registered."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medfl_ray.errors import ArtifactDamaged, RegistryError
from medfl_ray.failpoints import failpoint
from medfl_ray.store.durable import file_sha256, sha256, sync_folder
from medfl_ray.store.registry.artifacts import Artifact, ArtifactStore
from medfl_ray.store.registry.model_records import ModelVersion, VersionRecord, read_document

DESCRIPTION = "model.json"
RECORD = "registry.json"
PACKAGE_FILES = (
    DESCRIPTION,
    "model.onnx",
    "model.float16.onnx",
    "model.int8.onnx",
    "card.md",
    "card.json",
    "model.safetensors",
)
"""What may be registered. A run's folder holds pictures, ledgers and keys too, which never leave it this way."""


class PackageFile(NamedTuple):
    """A file of a package, and the SHA-256 that it must have; None where nothing says."""

    path: Path
    sha256: str | None


def package_files(folder: Path) -> dict[str, PackageFile]:
    """Return a package's files by name.

    Raises:
      RegistryError: model.json or one of the ONNX files it names is missing, or no plain file.
    """
    found = {name: folder / name for name in PACKAGE_FILES if os.path.lexists(folder / name)}
    for name, path in found.items():
        if path.is_symlink() or not path.is_file():
            raise RegistryError(
                f"{name!r} of {folder.name!r} is no plain file; a package is made of files, not of links"
            )
    if DESCRIPTION not in found:
        raise RegistryError(f"{folder.name!r} has no {DESCRIPTION}; export the model first: medfl-ray export RUN")
    expected = _described(found[DESCRIPTION])
    for name in expected:
        if name not in found:
            raise RegistryError(
                f"{folder.name!r} lacks {name!r}, which {DESCRIPTION} names; run medfl-ray export again"
            )
    belonging = {name: path for name, path in found.items() if not name.endswith(".onnx") or name in expected}
    return {name: PackageFile(path, expected.get(name)) for name, path in belonging.items()}


def keep_package(store: ArtifactStore, folder: Path) -> dict[str, Artifact]:
    """Keep a package's files, each the one that model.json describes, also where somebody writes it meanwhile.

    Raises:
      RegistryError: the package is not whole, or a file is another.
    """
    kept = {}
    for name, file in package_files(folder).items():
        kept[name] = store.put(file.path)
        if file.sha256 not in (None, kept[name].sha256):
            raise RegistryError(
                f"{name!r} of {folder.name!r} is not the file that {DESCRIPTION} describes; run medfl-ray export again"
            )
    return kept


def _described(path: Path) -> dict[str, str]:
    """Return the SHA-256 of model.json itself and of each variant; store does not know export, so it reads these."""
    try:
        content = path.read_bytes()
        variants = json.loads(content)["variants"]
        files = {str(entry["file"]): str(entry["sha256"]) for entry in variants.values()}
        complete = "float32" in variants
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise RegistryError(
            f"{DESCRIPTION} of {path.parent.name!r} names no float32 ONNX file; it is damaged or of an earlier "
            "version: run medfl-ray export again"
        ) from None
    return {**files, DESCRIPTION: sha256(content)}


def fetch_into(store: ArtifactStore, version: ModelVersion, into: Path) -> Path:
    """Make a package folder, whole or not at all; one that is there already is checked and kept.

    Raises:
      ArtifactDamaged: a file in the store, or in a folder fetched before, is not what was registered.
      RegistryError: the folder holds something else, or cannot be written.
    """
    try:
        if into.exists() and any(into.iterdir()):
            check_folder(into, version.record)
            return into
        into.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    except OSError as error:
        raise _cannot_write(into, error) from None
    try:
        for name, artifact in version.files.items():
            store.get(artifact, temporary / name)
            failpoint("registry.fetch.file")
        (temporary / RECORD).write_text(json.dumps(version.as_document(), indent=1), encoding="utf-8")
        _publish(temporary, into, version)
    except OSError as error:
        raise _cannot_write(into, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return into


def _publish(temporary: Path, into: Path, version: ModelVersion) -> None:
    temporary.chmod(0o755)
    sync_folder(temporary)
    failpoint("registry.fetch.complete")
    try:
        temporary.rename(into)  # also over an empty folder, never over one with files
    except OSError:
        if not into.is_dir():
            raise
        check_folder(into, version.record)  # another process was first
        return
    sync_folder(into.parent)


def check_folder(folder: Path, record: VersionRecord) -> None:
    """Check that a folder holds a version's files, unchanged, and no other.

    Raises:
      ArtifactDamaged: a file is missing or was changed.
      RegistryError: there is a file that does not belong to the version.
    """
    strangers = sorted({path.name for path in folder.iterdir()} - {*record.files, RECORD})
    if strangers:
        raise RegistryError(
            f"{folder.name!r} holds {strangers[0]!r}, which does not belong to version {record.version} of "
            f"{record.name!r}; fetch into an empty folder"
        )
    for name, artifact in record.files.items():
        _check_file(folder / name, artifact)


def verify_package(folder: Path, public_key: str | None = None) -> tuple[VersionRecord, str]:
    """Check a fetched package without its registry; return its record and the key that signed it.

    Args:
      public_key: the registry's, 64 hex digits, from a source other than the package. Without it damage is found, not
        a package that somebody else has signed.

    Raises:
      ArtifactDamaged: a file is missing or was changed.
      RegistryAltered: the record was.
      RegistryError: the folder is not one that was fetched.
    """
    try:
        document: Any = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        raise RegistryError(
            f"{folder.name!r} has no readable {RECORD}; fetch the model from its registry: medfl-ray models fetch"
        ) from None
    document = document if isinstance(document, Mapping) else {}
    record = read_document(document, public_key)
    check_folder(folder, record)
    return record, public_key or str(document["public_key"])


def _check_file(path: Path, artifact: Artifact) -> None:
    try:
        whole = not path.is_symlink() and file_sha256(path) == artifact.sha256
    except OSError:
        whole = False
    if not whole:
        raise ArtifactDamaged(
            f"{path.name!r} in {path.parent.name!r} is missing, or is not what was registered; it is not used. Remove "
            "the folder and fetch the model again"
        )


def _cannot_write(into: Path, error: OSError) -> RegistryError:
    return RegistryError(f"cannot write the folder {into.name!r} ({error.strerror}); free space or choose another")
