"""Giving freed memory back to the system between patients of large volumes.

glibc keeps freed blocks of up to 32 MB, and what one patient's pass leaves in between fits the next one's badly:
without this the memory of patient by patient grows to that of a batch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

LARGE_PATIENT_VOXELS = 2**17
"""Voxels of all patches of a patient from which one pass takes hundreds of megabytes."""
KEPT_ON_PURPOSE = "MALLOC_TRIM_THRESHOLD_"


def release_freed_memory() -> None:
    """Return freed heap pages to the system; does nothing without glibc, or where the environment says to keep them."""
    trim = _trim()
    if trim is not None and KEPT_ON_PURPOSE not in os.environ:
        trim(0)


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
