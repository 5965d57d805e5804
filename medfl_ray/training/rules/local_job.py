"""What one hospital does in one pass of training, and what comes of it.

Shapes: P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from medfl_ray.messages import Mechanism
from medfl_ray.params import Vector


@dataclass(frozen=True, eq=False)
class Pull:
    """What is added to every gradient: strength * (weights - centre) + offset.

    FedProx, SCAFFOLD, FedDyn and Ditto all add a term of this form. It is made of what the server sent and of what
    the hospital remembers, so that under DP it is added after the noise and costs nothing.

    Args:
      centre: [P]; where the pass starts when absent.
      offset: [P]; zero when absent.
    """

    strength: float = 0.0
    centre: Vector | None = None
    offset: Vector | None = None


@dataclass(frozen=True)
class LocalJob:
    """What one hospital does in one round, or in one pass of it.

    `seed_key` = (seed, round, hospital index) seeds sampling, patches, augmentation and dropout without DP;
    with a mechanism all of them come from the operating system's entropy and the key is ignored. `frozen` names
    tensors of the layout that stay as they are.
    """

    num_steps: int
    learning_rate: float
    mechanism: Mechanism | None
    seed_key: tuple[int, ...]
    pull: Pull | None = None
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class LocalOutcome:
    """Change of the weights [P], steps done and the mean patient loss (NaN if no patient was drawn)."""

    delta: Vector
    num_steps: int
    mean_loss: float
