"""Named places at which a test ends the process as a power cut would.

`MEDFL_FAILPOINT=name` kills at the first passage, `MEDFL_FAILPOINT=name:3` at the third. Unset, a
failpoint costs one look into the environment.
"""

from __future__ import annotations

import os
import signal

_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL if the environment names this place; nothing is flushed or cleaned up."""
    wanted = os.environ.get("MEDFL_FAILPOINT")
    if wanted is None:
        return
    place, _, count = wanted.partition(":")
    if place == name:
        _passages[name] = _passages.get(name, 0) + 1
        if _passages[name] >= int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
