"""Which part of a long list of cases runs today: another one every day, the whole list under the marker `long`.

The part is printed at the head of each run; MEDFL_SAMPLE=number chooses it, so that a failure is repeated.
"""

import datetime as dt
import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")


def sample_number() -> int:
    """Return the number of today's part: the day's, unless the environment says another."""
    return int(os.environ.get("MEDFL_SAMPLE") or dt.datetime.now(dt.UTC).date().toordinal())


def sampled(cases: Sequence[Case], num_parts: int) -> list[Case]:
    """Return every so-many-th case, so that each has its turn within as many days as there are parts."""
    return list(cases[sample_number() % num_parts :: num_parts])
