"""Files and folders of a hospital's or coordinator's state, which their owner alone may read, whatever the umask."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from medfl_ray.errors import LedgerError

OTHERS = 0o077
FILE_MODE = 0o600
FOLDER_MODE = 0o700


def open_new(path: Path) -> int:
    """Create a file that nobody else may read and return its descriptor, open for writing.

    Raises:
      FileExistsError: something of that name is there, a symbolic link included.
      OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), FILE_MODE)
    if os.name == "posix":
        os.fchmod(descriptor, FILE_MODE)  # an unusual umask may have taken the owner's own rights
    return descriptor


def make_private(path: Path) -> None:
    """Create an empty file where there is none; take every right of others away where there is one.

    SQLite gives the files that it makes beside a database the database's own mode.

    Raises:
      LedgerError: the file belongs to another user, and others may read it.
    """
    try:
        os.close(open_new(path))
    except FileExistsError:
        for part in (path, *(path.with_name(f"{path.name}-{kind}") for kind in ("wal", "shm", "journal"))):
            _tighten(part)


def claim_state_folder(folder: Path, holds_ledger: bool) -> None:
    """Make sure that a state folder is its owner's alone; one that holds a ledger already is refused, not mended.

    What others could have read, or replaced, while a ledger lay in an open folder nobody knows afterwards: that is for
    a person to decide.

    Raises:
      LedgerError: others may enter the folder of a ledger; or the folder is shared, or its mode cannot be changed.
    """
    if os.name != "posix" or not folder.is_dir():
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not mode & OTHERS:
        return
    if holds_ledger:
        raise LedgerError(
            f"other users may enter the state folder {folder.name!r} of a privacy ledger (mode {mode:03o}); run "
            "`chmod 700` on it, and check the ledger against its mirror if somebody did"
        )
    if not mode & stat.S_ISVTX:  # such a folder, as /tmp, belongs to all users of the machine
        with suppress(OSError):
            folder.chmod(FOLDER_MODE)
            mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & OTHERS:
        raise LedgerError(
            f"other users may enter the folder {folder.name!r} (mode {mode:03o}), where a privacy ledger is to lie; "
            "choose a folder of your own and run `chmod 700` on it"
        )


def _tighten(path: Path) -> None:
    if os.name != "posix":
        return
    try:
        mode = path.stat().st_mode
        if mode & OTHERS:
            path.chmod(FILE_MODE)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LedgerError(
            f"other users may read {path.name!r}, and its mode cannot be changed ({error.strerror}); run `chmod 600` "
            "on it as its owner"
        ) from None
