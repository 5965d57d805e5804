"""Times as they may be written down: exact, or by the hour where who takes part in a round is secret.

A round of a larger cohort takes longer. The epsilon of such a run counts on a cohort that nobody knows, so that exact
times would contradict it. Anyone who watches the processes while they run sees more; docs/privacy.md says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from medfl_ray.config.run import RunConfig

GRID_S = 3600
"""Times of runs with secret cohorts are rounded up to multiples of this, in UTC."""
_GRID_NS = GRID_S * 10**9

Clock = Callable[[], datetime]


def has_secret_cohorts(run: RunConfig) -> bool:
    """Say whether hospitals are drawn in secret: the hospital-level Gaussian mechanism with sampling."""
    privacy = run.privacy
    return privacy.hospital_dp and privacy.hospital_level.mechanism != "tree" and run.federation.fraction < 1


def exact_now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def coarse_now() -> datetime:
    """Return the time rounded up to the grid, in UTC."""
    return rounded_up(datetime.now(UTC))


def clock_of(secret: bool) -> Clock:
    """Return the clock of a run; `secret` where its cohorts are."""
    return coarse_now if secret else exact_now


def rounded_up(moment: datetime) -> datetime:
    """Return the first moment of the grid that is not before another moment, in UTC."""
    return datetime.fromtimestamp(math.ceil(moment.timestamp() / GRID_S) * GRID_S, UTC)


def stamp(moment: datetime) -> str:
    """Return a moment as ISO 8601 to the second."""
    return moment.isoformat(timespec="seconds")


def round_file_times(paths: Iterable[Path]) -> None:
    """Round up when files and folders were last read and changed, which copies and backups keep.

    What others remove meanwhile is passed over. When the inode changed no program can set; it stays on this disk.
    """
    for path in paths:
        try:
            changed_ns = path.lstat().st_mtime_ns
            rounded_ns = -(-changed_ns // _GRID_NS) * _GRID_NS
            if rounded_ns != changed_ns:
                os.utime(path, ns=(rounded_ns, rounded_ns), follow_symlinks=False)
        except FileNotFoundError:
            continue
