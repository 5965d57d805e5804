"""Named places at which a test ends the process as a power cut would, or fills its disk.

`MEDFL_FAILPOINT=name` kills at the first passage, `MEDFL_FAILPOINT=name:3` at the third, and
`MEDFL_FAILPOINT=name:3:enospc` raises there what a full disk raises. Unset, a failpoint costs one look into
the environment.
"""

from __future__ import annotations

import errno
import os
import signal

_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Fail here if the environment names this place: SIGKILL, with nothing flushed or cleaned up, or OSError.

    Raises:
      OSError: no space left on device, where the environment asks for `enospc`.
    """
    wanted = os.environ.get("MEDFL_FAILPOINT")
    if wanted is None:
        return
    place, _, rest = wanted.partition(":")
    if place != name:
        return
    count, _, action = rest.partition(":")
    _passages[wanted] = _passages.get(wanted, 0) + 1
    if _passages[wanted] < int(count or 1):
        return
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL)
