"""Images that a viewer keeps at the service for a while, to segment them more than once; each belongs to a token."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from pathlib import Path
from typing import TypedDict

from serve.clinic.scratch import remove, remove_unless_new
from serve.refusals import NotServed, TooMany

SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")
STATE, IMAGE = "session.json", "upload"
MAX_SESSIONS, MAX_PER_OWNER, KEEP_S = 64, 8, 3600.0


class _State(TypedDict):
    owner: str
    expires_at: float


class SessionBook:
    """Sessions in a folder that every ingress replica of a machine shares."""

    def __init__(self, root: Path) -> None:
        """Take an existing or a new folder, which only this user may read."""
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def open(self, owner: str) -> tuple[str, Path]:
        """Return the id of a new session and the folder that its image is to be written into, as `upload`.

        Raises:
          TooMany: there are too many sessions, of this owner or in all.
        """
        self.sweep()
        owners = [state["owner"] for state in map(self._state, self._names()) if state is not None]
        if len(owners) >= MAX_SESSIONS or owners.count(_digest(owner)) >= MAX_PER_OWNER:
            raise TooMany(f"there are {len(owners)} sessions; delete some, or wait until they expire")
        name = secrets.token_urlsafe(16)
        folder = self._root / name
        folder.mkdir(mode=0o700)
        state = _State(owner=_digest(owner), expires_at=time.time() + KEEP_S)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        return name, folder

    def image(self, name: str, owner: str) -> Path:
        """Return the image of a session.

        Raises:
          NotServed: there is no such session of this owner, or it expired.
        """
        state = self._state(name) if SESSION_ID.fullmatch(name) else None
        path = self._root / name / IMAGE
        if state is None or state["owner"] != _digest(owner) or state["expires_at"] < time.time() or not path.is_file():
            raise NotServed("there is no such session of this token; it may have expired")
        return path

    def delete(self, name: str) -> None:
        """Remove a session that `image` has found, or that failed to open."""
        remove(self._root / name)

    def sweep(self) -> None:
        """Remove what expired, and what nobody can find because its state is damaged."""
        for name in self._names():
            state = self._state(name)
            if state is None:
                remove_unless_new(self._root / name)
            elif state["expires_at"] < time.time():
                self.delete(name)

    def _names(self) -> list[str]:
        return [folder.name for folder in self._root.iterdir() if SESSION_ID.fullmatch(folder.name)]

    def _state(self, name: str) -> _State | None:
        try:
            state: _State = json.loads((self._root / name / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()
