"""When a round's deadline passes; one clock for every pool, since all of them count from the reservation."""

from __future__ import annotations

import time
from collections.abc import Callable

from medfl_ray.messages import RoundPlan


class RoundClock:
    """Counts from the moment at which a pool first hears of a round's attempt, which is when it reserves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a clock that returns seconds and never goes back."""
        self._clock = clock
        self._key, self._started = (0, 0), 0.0

    def begin(self, plan: RoundPlan) -> float:
        """Start to count where the round's attempt is new; return the clock's time at which it was first heard of."""
        key = (plan.round, plan.attempt)
        if self._key != key:
            self._key, self._started = key, self._clock()
        return self._started

    def seconds_since_start(self, plan: RoundPlan) -> float:
        """Return how long ago this pool first heard of the round's attempt; about 0 at the first call."""
        started = self.begin(plan)
        return self._clock() - started

    def end(self, plan: RoundPlan) -> float | None:
        """Return the clock's time at which the deadline passes; None without a deadline."""
        started = self.begin(plan)
        return None if plan.deadline_s is None else started + plan.deadline_s

    def seconds_left(self, plan: RoundPlan) -> float | None:
        """Return the seconds until the deadline, at least 0; None without a deadline."""
        since = self.seconds_since_start(plan)
        return None if plan.deadline_s is None else max(0.0, plan.deadline_s - since)

    def is_late(self, plan: RoundPlan) -> bool:
        """Whether the deadline has passed."""
        return plan.deadline_s is not None and self.seconds_since_start(plan) > plan.deadline_s
