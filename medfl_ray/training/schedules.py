"""How the local learning rate falls over the rounds: pure functions of the round's number."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    initial: float, schedule: Literal["constant", "cosine", "linear"], round_number: int, num_rounds: int
) -> float:
    """Return the learning rate of a round; rounds count from 0 and the last one still learns.

    'cosine' and 'linear' fall from `initial` in round 0 towards zero, which a round after the last would reach.
    """
    progress = min(max(round_number, 0), num_rounds) / num_rounds
    if schedule == "cosine":
        return initial * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return initial * (1.0 - progress)
    return initial
