"""Where clusters that we start keep their sessions: logs, sockets and spilled objects, which nobody else may read.

Ray opens its own folders to everybody whatever the umask, so that a folder above them keeps others out. What is written
in them has the modes of a umask that Ray's processes inherit.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medfl_ray.errors import ClusterError

OTHERS = 0o077
LOCK = "medfl.lock"
LOGS = "logs"
KEEP_LOGS_S = 7 * 86400
"""Seconds for which the logs of a cluster that has ended are kept; all else of its session goes at once."""
STARTING_S = 86400
"""A session without our lock may be one that is just being started; an older one is not."""
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
MAX_ROOT_LENGTH = MAX_SOCKET_PATH - 71
"""Bytes of a path at most: the paths of sockets below it are 71 bytes longer."""


def session_root() -> Path:
    """Return where our clusters' sessions lie: below RAY_TMPDIR, TMPDIR where its path is short enough, or /tmp.

    Raises:
      ClusterError: RAY_TMPDIR is too long for the paths of Unix sockets.
    """
    asked = os.environ.get("RAY_TMPDIR")
    for base in (asked, os.environ.get("TMPDIR"), "/tmp"):
        if base:
            root = Path(base).absolute() / f"medfl-ray-{os.getuid()}"
            if len(os.fsencode(root / "ray")) <= MAX_ROOT_LENGTH:
                return root
            if base == asked:
                break
    raise ClusterError(
        f"RAY_TMPDIR is too long for the paths of Unix sockets; choose one of at most {MAX_ROOT_LENGTH - 20} "
        "characters, or leave it out"
    )


def claim_root(root: Path) -> Path:
    """Make the folder that keeps others out of our sessions, or check it, and return the folder for Ray in it.

    Raises:
      ClusterError: it cannot be made, is a link, belongs to somebody else, or others may enter or replace it.
    """
    try:
        around = root.parent.stat().st_mode
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise ClusterError(
            f"cannot make the folder {root.name!r} for Ray's sessions: {error.strerror}. Set RAY_TMPDIR to a short "
            "path that you may write to"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ClusterError(
            f"{root.name!r}, the folder for Ray's sessions, is not a folder of this user, so that somebody else could "
            "read what hospitals log. Remove it, or set RAY_TMPDIR to a folder of your own"
        )
    if found.st_mode & OTHERS or (around & 0o022 and not around & stat.S_ISVTX):
        raise ClusterError(
            f"other users may enter or replace {root.name!r}, the folder for Ray's sessions: remove it, or set "
            "RAY_TMPDIR to a folder that nobody else may write to"
        )
    return root / "ray"


@contextmanager
def owner_only_files() -> Iterator[int]:
    """Have files made for their owner alone, and no core files, by processes that are started meanwhile.

    A core file of a hospital's process would hold its images. Yields this process's umask, which is its own again
    afterwards.
    """
    before, limits = os.umask(OTHERS), resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    try:
        yield before
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
        os.umask(before)


def hold(session: Path) -> int:
    """Mark a session as alive for as long as this process keeps the returned descriptor open; close its folders."""
    close_folders(session)
    made = session / f"{LOCK}.new"
    lock = os.open(made, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    made.rename(session / LOCK)  # never there without being held
    return lock


def close_folders(session: Path) -> None:
    """Take from others what Ray gave them on its folders, a session's and the one around it; links are left alone."""
    for folder in (session.parent, *(Path(found) for found, _, _ in os.walk(session))):
        with suppress(FileNotFoundError):  # Ray's processes go on working
            folder.chmod(0o700)


def sweep(ray_folder: Path) -> None:
    """Remove what clusters that have ended left behind, but for their logs, and those as well after a while."""
    for session in ray_folder.glob("session_*_*"):
        with suppress(FileNotFoundError):  # another start is removing it
            if not session.is_symlink() and session.is_dir() and _has_ended(session):
                discard(session)


def discard(session: Path) -> None:
    """Remove a session that has ended: its logs stay for a week, for anyone who looks for the reason of a failure."""
    if time.time() - session.stat().st_mtime > KEEP_LOGS_S:
        shutil.rmtree(session, ignore_errors=True)
        return
    close_folders(session)
    for part in session.iterdir():
        if part.name in (LOGS, LOCK):
            continue
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _has_ended(session: Path) -> bool:
    try:
        lock = os.open(session / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return time.time() - session.stat().st_mtime > STARTING_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
