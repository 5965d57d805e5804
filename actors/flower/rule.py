"""The combination rule of a run whose strategy is one of Flower's; Flower itself is imported only for such a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from medfl_ray.assembly.run import NO_EXTRAS, RunExtras, initial_weights
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError
from medfl_ray.federation.events import Event


def with_flower(run: RunConfig, emit: Callable[[Event], None], extras: RunExtras = NO_EXTRAS) -> RunExtras:
    """Return a run's extras with its Flower strategy as the rule over all updates, tried out on the first weights.

    Raises:
      ConfigError: the strategy cannot be made or does not go with the run.
    """
    if run.aggregation.strategy != "flower":
        return extras
    try:
        from actors.flower.aggregation import FlowerAggregation
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise ConfigError(
            "aggregation.strategy 'flower' needs the package flwr, which this Python cannot import; install medfl-ray "
            "with its dependencies, or choose another strategy"
        ) from None

    aggregation = FlowerAggregation(run, emit)
    first_weights = aggregation.checked(extras.first_weights or initial_weights(run))
    return replace(extras, first_weights=first_weights, combine=aggregation)
