"""Which hospitals a round asks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medfl_ray.config import RunConfig

EVALUATED = 0xE7A1  # keeps the draw of those who evaluate apart from the draws of the rounds


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


def select_of_run(run: RunConfig, available: Sequence[str], round: int) -> tuple[str, ...]:
    """Draw as a run's configuration says."""
    return select_hospitals(available, run.federation.fraction, run.federation.seed, round)


def select_evaluated(available: Sequence[str], count: int | None, seed: int) -> tuple[str, ...]:
    """Draw once who scores the weights, so that the rounds of a run can be compared; all where no count is given."""
    ordered = sorted(available)
    if count is None or count >= len(ordered):
        return tuple(available)
    rng = np.random.default_rng(np.random.SeedSequence([abs(seed), EVALUATED]))
    return tuple(ordered[i] for i in sorted(rng.choice(len(ordered), size=count, replace=False)))
