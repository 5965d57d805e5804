"""Additions that round downward: a mode of the processor, set through the C library for a stretch of code.

To the nearest, a sum that lies halfway goes to the even neighbour, and so depends on what was there before. Downward,
it depends on the number alone: where all sums share one exponent, adding x to any of them adds x rounded down.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

_DOWNWARD = {"x86_64": 0x400, "AMD64": 0x400, "aarch64": 0x800000, "arm64": 0x800000}
"""FE_DOWNWARD of <fenv.h>, which is a bit of the processor's control register."""
_PROBED = np.full(64, 1.0)
_ADDED = np.full(64, 0.75 * 2.0**-52, np.float32)

Mode = tuple[Callable[[], int], Callable[[int], int], int]


def _find_mode() -> Mode | None:
    """Return how to read and set the mode, and downward's number; None where the C library or processor is unknown."""
    try:
        library = ctypes.CDLL(None)
        return library.fegetround, library.fesetround, _DOWNWARD[platform.machine()]
    except (AttributeError, KeyError, OSError, TypeError):
        return None


_MODE = _find_mode()


@contextmanager
def rounding_down() -> Iterator[bool]:
    """Have this thread's additions round downward inside the block; yield whether they do, by trying it.

    Other threads keep their own mode, and this one has its former mode back after the block.
    """
    if _MODE is None:
        yield False
        return
    current, switch, downward = _MODE
    former = current()
    try:
        switch(downward)
        yield bool((np.add(_PROBED, _ADDED) == _PROBED).all())
    finally:
        switch(former)
