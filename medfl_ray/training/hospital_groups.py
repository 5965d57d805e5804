"""How many virtual hospitals are trained at once."""

from __future__ import annotations

from medfl_ray.training.many_hospitals import why_not_together
from medfl_ray.training.trainer import Trainer

USUAL = 8


def choose_hospitals_per_group(trainer: Trainer) -> int:
    """Return the configured number, else the usual one, and 1 for networks that cannot be grouped."""
    if why_not_together(trainer):
        return 1
    return trainer.training.hospitals_per_group or USUAL
