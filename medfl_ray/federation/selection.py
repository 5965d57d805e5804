"""Which hospitals a round asks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medfl_ray.config.run import RunConfig

EVALUATED = 0xE7A1  # keeps the draw of those who evaluate apart from the draws of the rounds


def num_wanted(num_available: int, fraction: float) -> int:
    """Return how many hospitals a round wants: ceil(fraction * available)."""
    return math.ceil(fraction * num_available)


def select_hospitals(
    available: Sequence[str], fraction: float, seed: int, round: int, over_selection: float = 0.0
) -> tuple[str, ...]:
    """Draw hospitals without replacement, the same for the same seed and round: those wanted and so many more.

    The draw is public: no amplification by sampling of hospitals is claimed for it.
    """
    ordered = sorted(available)
    count = math.ceil(num_wanted(len(ordered), fraction) * (1 + over_selection))
    if count >= len(ordered):
        return tuple(ordered)
    rng = np.random.default_rng(np.random.SeedSequence([abs(seed), round, 0x5E1EC7]))
    chosen = rng.choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def select_of_run(run: RunConfig, round: int, available: Sequence[str]) -> tuple[str, ...]:
    """Draw as a run's configuration says."""
    config = run.federation
    return select_hospitals(available, config.fraction, config.seed, round, config.over_selection)


def enough_updates(run: RunConfig, num_available: int, num_asked: int) -> int | None:
    """Return the number of updates after which a round of over-selected hospitals closes; None without them."""
    wanted = num_wanted(num_available, run.federation.fraction)
    return wanted if run.federation.over_selection and wanted < num_asked else None


def select_evaluated(available: Sequence[str], count: int | None, seed: int) -> tuple[str, ...]:
    """Draw once who scores the weights, so that the rounds of a run can be compared; all where no count is given."""
    ordered = sorted(available)
    if count is None or count >= len(ordered):
        return tuple(available)
    rng = np.random.default_rng(np.random.SeedSequence([abs(seed), EVALUATED]))
    return tuple(ordered[i] for i in sorted(rng.choice(len(ordered), size=count, replace=False)))
