"""Folders for what requests bring, one place per process; what a process that was killed has left goes by the next.

A process holds a lock as long as it lives, and the kernel lets go of it however the process ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import structlog

from serve.clinic.pools import DISK

ATTEMPTS, WAIT_S = 5, 0.05
UNREADABLE_AFTER_S = 600.0  # a state is written right after its folder is made
GUARD, LOCK = "guard", ".lock"
log = structlog.get_logger("medfl_ray.serve")


class Scratch:
    """This process's folder in a root that all replicas of a machine share; made at its first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: Path | None = None
        self._lock = -1

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """Yield an empty folder that this user alone may read; it goes with the block."""
        path = await DISK.run(self._make)
        try:
            yield path
        finally:
            await DISK.run(remove, path)

    def sweep(self) -> None:
        """Remove the folders of processes that have ended."""
        with self._guarded():
            for lock in self._root.glob(f"*{LOCK}"):
                if self._own is None or lock.stem != self._own.name:
                    _remove_if_dead(lock)

    def close(self) -> None:
        """Remove this process's folder."""
        if self._own is None:
            return
        with self._guarded():
            remove(self._own)
            self._own.with_suffix(LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._own = None

    def _make(self) -> Path:
        with self._guarded():
            if self._own is None:
                own = self._root / secrets.token_hex(8)
                self._lock = os.open(own.with_suffix(LOCK), os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                own.mkdir(mode=0o700)
                self._own = own
        path = self._own / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return path

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let one thread of one process at a time make or remove a process's folder."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        guard = os.open(self._root / GUARD, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield
        finally:
            os.close(guard)


def _remove_if_dead(lock: Path) -> None:
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(handle)  # the guard keeps others away
    remove(lock.with_suffix(""))
    lock.unlink()


def remove(folder: Path) -> None:
    """Remove a folder; again where something was still written into it, and the log says if it stays."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(WAIT_S)
    log.error("folder_not_removed", kind=folder.parent.name)


def remove_unless_new(folder: Path) -> None:
    """Remove a folder that nothing was put into for a while."""
    try:
        changed_at = folder.stat().st_mtime
    except FileNotFoundError:
        return
    if time.time() - changed_at > UNREADABLE_AFTER_S:
        remove(folder)
