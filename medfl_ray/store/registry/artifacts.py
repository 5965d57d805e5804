"""Files by what is in them: kept under their SHA-256, locally or on S3, and checked at every read.

A file that has a name here is whole: locally it is written beside, flushed and renamed; S3 shows an object only when
all of it has arrived. Nothing is ever changed, so that two writers of the same content cannot disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field

from medfl_ray.errors import ArtifactDamaged, RegistryError
from medfl_ray.failpoints import failpoint
from medfl_ray.store.durable import file_sha256, sync_folder

BLOBS = "blobs/sha256"
INCOMING = "incoming"
CHUNK_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


class Artifact(BaseModel):
    """A file's content: its SHA-256 in hex, and its size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class ArtifactStore:
    """A folder or a bucket of files under their SHA-256."""

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        """Take a local folder or a URL that fsspec knows; `options` go to its file system. Nothing is made yet.

        Raises:
          RegistryError: no installed package knows the URL's scheme.
        """
        try:
            self._fs, self._root = fsspec.url_to_fs(root, **_fresh_listings(root), **dict(options or {}))
        except (ImportError, ValueError):
            raise RegistryError(
                "the registry's place cannot be opened: for s3:// install medfl-ray with the extra, "
                "pip install 'medfl-ray[s3]'; a local folder needs nothing"
            ) from None
        self.is_local = isinstance(self._fs, LocalFileSystem)

    @property
    def local_folder(self) -> Path | None:
        """The folder of a local store; None of any other."""
        return Path(self._root) if self.is_local else None

    def put(self, path: Path) -> Artifact:
        """Keep a file's content, durable when this returns; content that is there and whole is not written again.

        Raises:
          RegistryError: the file cannot be read, or the store cannot be written.
        """
        with self._in_plain_words("be written"), self._incoming() as temporary:
            artifact = _copy(path, temporary)
            place = self._place(artifact.sha256)
            if self._is_whole(artifact):
                return artifact
            failpoint("registry.artifact.copied")
            if self.is_local:
                self._make_folder(Path(place).parent)
                temporary.replace(place)
                sync_folder(Path(place).parent)
            else:
                self._fs.put_file(str(temporary), place)
            failpoint("registry.artifact.kept")
        return artifact

    def get(self, artifact: Artifact, into: Path) -> None:
        """Write content into a new file, flushed to the disk; a file with other content is removed again.

        Raises:
          ArtifactDamaged: the content is gone or was changed.
          RegistryError: the store or the file's folder cannot be reached.
        """
        place = self._place(artifact.sha256)
        with self._in_plain_words("be read"):
            try:
                if self._fs.size(place) != artifact.size_bytes:  # before a large one is fetched
                    raise _damaged(artifact)
                self._fs.get_file(place, str(into))
            except FileNotFoundError:
                raise _gone(artifact) from None
            if file_sha256(into) != artifact.sha256:
                into.unlink(missing_ok=True)
                raise _damaged(artifact)
            with into.open("rb") as stream:
                os.fsync(stream.fileno())

    def check(self, artifact: Artifact) -> None:
        """Read content through and compare it with its name.

        Raises:
          ArtifactDamaged: it is gone or was changed.
          RegistryError: the store cannot be reached.
        """
        with self._in_plain_words("be read"):
            try:
                whole = self._digest(self._place(artifact.sha256)) == artifact.sha256
            except FileNotFoundError:
                raise _gone(artifact) from None
        if not whole:
            raise _damaged(artifact)

    def _place(self, sha256: str) -> str:
        assert SHA256.fullmatch(sha256)
        return f"{self._root.rstrip('/')}/{BLOBS}/{sha256[:2]}/{sha256}"

    def _is_whole(self, artifact: Artifact) -> bool:
        """Say whether content is there already; damaged content is written anew."""
        try:
            return self._digest(self._place(artifact.sha256)) == artifact.sha256
        except FileNotFoundError:
            return False

    def _digest(self, place: str) -> str:
        with self._fs.open(place, "rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _make_folder(self, folder: Path) -> None:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in missing:
            sync_folder(place.parent)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """Yield a file of this process alone: in the store where that can be renamed, else in the temporary folder."""
        if self.is_local:
            folder = Path(self._root) / INCOMING
            self._make_folder(folder)
        else:
            folder = Path(tempfile.mkdtemp(prefix="medfl-ray-"))
        temporary = folder / uuid.uuid4().hex
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            if not self.is_local:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _in_plain_words(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What a server says may hold its address and keys, so the kind of error has to do.
            why = error.strerror if self.is_local and error.strerror else type(error).__name__
            raise RegistryError(
                f"the registry's files cannot {verb} ({why}); check the disk, or the bucket and its access"
            ) from None
        except _errors_of(self._fs) as error:
            raise RegistryError(
                f"the registry's bucket cannot {verb} ({type(error).__name__}); check its address, name and access"
            ) from None


def _copy(source: Path, target: Path) -> Artifact:
    """Copy and hash in one pass, so that a file that changes meanwhile still gets the hash of what was kept."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("xb") as writing:
        while chunk := reading.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return Artifact(sha256=digest.hexdigest(), size_bytes=size)


def _fresh_listings(root: str) -> dict[str, Any]:
    """Let s3fs ask the bucket each time: another machine may have written since."""
    return {"use_listings_cache": False} if root.startswith(("s3://", "s3a://")) else {}


def _errors_of(fs: Any) -> tuple[type[Exception], ...]:
    """Return what a file system raises beside OSError."""
    if "s3" not in fs.protocol:
        return ()
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError)


def _gone(artifact: Artifact) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"the registry's file {artifact.sha256[:12]}... is gone; restore it from a backup, or register the model again"
    )


def _damaged(artifact: Artifact) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"the registry's file {artifact.sha256[:12]}... does not have the content that was registered: it is damaged "
        "or was exchanged. It is not used; restore it from a backup, or register the model again"
    )
