"""How the local learning rate changes over the rounds: a pure function of the round's number."""

from __future__ import annotations

import math

from medfl_ray.config.training import TrainingConfig


def learning_rate(training: TrainingConfig, round_number: int, num_rounds: int) -> float:
    """Return the learning rate of a round; rounds count from 1 to num_rounds.

    'cosine' and 'linear' start at the configured rate and would reach zero in the round after the last; 'step'
    multiplies it every lr_step_rounds. In a warm-up of n rounds, round k has k / (n + 1) of what it would have.
    """
    warm = min(1.0, round_number / (training.lr_warmup_rounds + 1))
    return training.learning_rate * warm * _scheduled(training, round_number, num_rounds)


def _scheduled(training: TrainingConfig, round_number: int, num_rounds: int) -> float:
    done = max(round_number - 1, 0)
    progress = min(done, num_rounds) / num_rounds
    if training.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if training.lr_schedule == "linear":
        return 1.0 - progress
    if training.lr_schedule == "step":
        return float(training.lr_step_factor ** (done // training.lr_step_rounds))
    return 1.0
