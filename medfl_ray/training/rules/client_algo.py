"""A MONAI ClientAlgo in the place of our trainer: it reads its own data and trains as it likes, on the round's weights.

Its steps are its own, so that no bound on what one patient changes is known: patient-level differential privacy is
refused, and hospital-level, which clips a whole update, is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medfl_ray.errors import ConfigError, ModelError, NotFitForDP
from medfl_ray.named_code import named_function
from medfl_ray.params import Layout, Vector, to_tensors

if TYPE_CHECKING:
    import torch
    from monai.fl.client.client_algo import ClientAlgo

    from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome


@dataclass(frozen=True)
class AlgoData:
    """What the run itself says of data that a ClientAlgo keeps to itself."""

    channels: tuple[str, ...]
    labels: Mapping[int, str]

    def close(self) -> None:
        """Nothing is open."""


class AlgoTrainer:
    """Trains and evaluates by a ClientAlgo, which is initialised when it is made."""

    def __init__(self, factory: str, hospital: str, layout: Layout) -> None:
        """Make the ClientAlgo of a hospital.

        Args:
          factory: 'module:function', called with the hospital's name.
          layout: of the run's network, whose names and shapes the ClientAlgo's weights must have.

        Raises:
          ConfigError: the function cannot be imported, or returns something else.
        """
        self.layout = layout
        self.device = "as the ClientAlgo chooses"
        self._algo = make_algo(factory, hospital)
        from monai.fl.utils.constants import ExtraItems

        self._algo.initialize({ExtraItems.CLIENT_NAME: hospital})

    def train(self, weights: Vector, data: AlgoData, job: LocalJob) -> LocalOutcome:
        """Have the ClientAlgo train from the given weights and return their change.

        Raises:
          NotFitForDP: the job has a patient-level mechanism, which a ClientAlgo does not carry out.
          ModelError: it returned no weights of the run's network, or took other steps than the plan's.
        """
        from medfl_ray.training.rules.local_job import LocalOutcome

        if job.mechanism is not None:
            raise NotFitForDP(
                "a ClientAlgo takes its own steps, which nothing clips and noises patient by patient; train with the "
                "run's own network, or without patient-level differential privacy"
            )
        self._algo.train(self._exchange(weights))
        found = self._algo.get_weights()
        returned = vector_of(found.weights, self.layout)
        delta = returned if is_difference(found) else returned - weights
        self._check_steps(found.statistics or {}, job.num_steps)
        if not np.isfinite(delta).all():
            raise ModelError("the ClientAlgo returned weights that are no numbers; its training diverged")
        return LocalOutcome(np.asarray(delta, dtype=np.float32), job.num_steps, math.nan)

    def metrics(self, weights: Vector) -> dict[str, float]:
        """Have the ClientAlgo score weights; a Dice of its own name is "dice" too, by which rounds are judged."""
        found = self._algo.evaluate(self._exchange(weights)).metrics or {}
        values = {str(name): float(value) for name, value in found.items() if np.ndim(value) == 0}
        dice = [value for name, value in values.items() if name.lower().endswith("dice")]
        return {**values, "dice": dice[0]} if len(dice) == 1 else values

    def _exchange(self, weights: Vector) -> Any:
        import torch
        from monai.fl.utils.constants import WeightType
        from monai.fl.utils.exchange_object import ExchangeObject

        named = {name: torch.from_numpy(part.copy()) for name, part in to_tensors(weights, self.layout).items()}
        return ExchangeObject(weights=named, weight_type=WeightType.WEIGHTS)

    def _check_steps(self, statistics: Mapping[Any, Any], planned: int) -> None:
        """Refuse another number of steps than the plan's: receipts, weights of steps and charges go by the plan."""
        from monai.fl.utils.constants import FlStatistics

        done = statistics.get(FlStatistics.NUM_EXECUTED_ITERATIONS)
        if done is not None and int(done) != planned:
            raise ModelError(
                f"the ClientAlgo took {int(done)} steps; the plan asks for {planned}. Set federation.local_steps to "
                f"{int(done)}, or change the ClientAlgo's epochs or batch size"
            )


def make_algo(factory: str, hospital: str) -> ClientAlgo:
    """Import 'module:function' and return the ClientAlgo that it makes for a hospital.

    Raises:
      ConfigError: it cannot be imported, or returns something else.
    """
    from monai.fl.client.client_algo import ClientAlgo

    remedy = "put the module on the PYTHONPATH of every hospital's process"
    make = named_function(factory, "training.client_algo", remedy)
    algo = make(hospital)
    if not isinstance(algo, ClientAlgo):
        raise ConfigError(
            f"training.client_algo {factory!r} returned a {type(algo).__name__}; it must return a "
            "monai.fl.client.ClientAlgo"
        )
    return algo


def is_difference(exchanged: Any) -> bool:
    """Say whether a ClientAlgo returned the change of the weights rather than the weights."""
    from monai.fl.utils.constants import WeightType

    return bool(exchanged.weight_type == WeightType.WEIGHT_DIFF)


def vector_of(weights: Mapping[str, torch.Tensor] | None, layout: Layout) -> Vector:
    """Return named weights as a vector [P].

    Raises:
      ModelError: they are not those of the run's network.
    """
    found = weights or {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in found or tuple(np.shape(found[name])) != shape:
            raise ModelError(
                f"the ClientAlgo's weights have no {name!r} of shape {shape}; its network must be the run's, as with "
                "model.type: bundle of the same bundle"
            )
    parts = [np.asarray(found[name], dtype=np.float32).ravel() for name in layout.names]
    return np.concatenate(parts)
