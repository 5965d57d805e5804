"""How the local learning rate falls over the rounds: a pure function of the round's number."""

from __future__ import annotations

import math

from medfl_ray.config import TrainingConfig


def learning_rate(training: TrainingConfig, round_number: int, num_rounds: int) -> float:
    """Return the learning rate of a round; rounds count from 1 to num_rounds.

    'cosine' and 'linear' start at the configured rate and would reach zero in the round after the last.
    """
    progress = min(max(round_number - 1, 0), num_rounds) / num_rounds
    if training.lr_schedule == "cosine":
        return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if training.lr_schedule == "linear":
        return training.learning_rate * (1.0 - progress)
    return training.learning_rate
