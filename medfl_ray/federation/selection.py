"""Which hospitals a round asks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def select_hospitals(available: Sequence[str], fraction: float, seed: int, round: int) -> tuple[str, ...]:
    """Draw ceil(fraction * available) hospitals without replacement, the same for the same seed and round.

    The draw is public: no amplification by sampling of hospitals is claimed for it.
    """
    ordered = sorted(available)
    count = math.ceil(fraction * len(ordered))
    if count >= len(ordered):
        return tuple(ordered)
    rng = np.random.default_rng(np.random.SeedSequence([abs(seed), round, 0x5E1EC7]))
    chosen = rng.choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))
