"""Writing files so that a crash at any point leaves the old content or the new, never a torn one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from medfl_ray.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes, private: bool = False) -> None:
    """Write a new file and flush it to the disk.

    Args:
      private: its owner alone may read it, whatever the umask.

    Raises:
      StorageError: the disk is full or the folder cannot be written.
    """
    try:
        with path.open("wb") as stream:
            if private and os.name == "posix":
                os.fchmod(stream.fileno(), 0o600)  # before there is anything in it to read
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path.name!r}: {error.strerror or type(error).__name__}. Free space or choose another "
            "output.directory; what was written before is intact, continue with medfl-ray run --resume."
        ) from None


def replace_file(path: Path, content: bytes, private: bool = False) -> None:
    """Replace a file's content in one step; with `private` its owner alone may read it.

    Raises:
      StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content, private)
    temporary.replace(path)
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk; the torn last line that a crash has left, which nobody was told of as
    written, is removed first.

    Raises:
      StorageError: the disk is full or the file cannot be written.
    """
    try:
        with path.open("ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot append to {path.name!r}: {error.strerror or type(error).__name__}. Free space; the run continues "
            "from its last checkpoint with medfl-ray run --resume."
        ) from None


def sha256(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
