"""Folders for prepared volumes on the disk: locked by the process that made them, removed by it or after its death.

A process that is killed removes nothing. So whoever makes a folder there first sweeps those whose lock nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

PREFIX = "prepared-"
LOCK, NEW_LOCK = ".lock", ".lock.new"


def locked_folder(root: Path | None) -> tuple[Path, Callable[[], None]]:
    """Make a folder that its owner alone may enter and return it with what removes it again.

    Args:
      root: where it lies, beside others whose dead owners' folders are removed; a temporary folder when None.
    """
    if root is not None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep_caches(root)
    name = PREFIX if root is not None else f"medfl-ray-{PREFIX}"
    folder = Path(tempfile.mkdtemp(prefix=name, dir=root))
    lock = os.open(folder / NEW_LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / NEW_LOCK).rename(folder / LOCK)  # a folder with a lock that nobody holds is an abandoned one
    owner = os.getpid()

    def release() -> None:
        if os.getpid() == owner:  # a forked process leaves it to the one that made it
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    return folder, release


def sweep_caches(root: Path) -> int:
    """Remove the folders below a root whose process is gone; return how many."""
    removed = 0
    for folder in sorted(root.glob(f"{PREFIX}*")) if root.is_dir() else ():
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def private_file(path: str, flags: int) -> int:
    """Open a file that its owner alone may read, for `open(..., opener=private_file)`."""
    return os.open(path, flags, 0o600)


def _is_abandoned(folder: Path) -> bool:
    """Say whether nobody holds the lock of a folder; one that is being made has none yet, and is left alone."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
