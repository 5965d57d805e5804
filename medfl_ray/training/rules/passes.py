"""Driving the rule of a strategy: one hospital's passes one by one, or those of many hospitals side by side."""

from __future__ import annotations

import numpy as np
import structlog

from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector
from medfl_ray.training.local_data import LocalData
from medfl_ray.training.rules.client_rules import (
    Memory,
    RuleInput,
    RuleResult,
    RuleSteps,
    TrainingPass,
    average,
    client_rule,
    evaluated_weights,
)
from medfl_ray.training.rules.kept_parameters import kept_parameters
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome
from medfl_ray.training.trainer import Trainer

log = structlog.get_logger()
LOSS_DRAW = 2
"""Keeps the patches on which a loss is measured apart from those of the passes."""


class LocalRules:
    """The hospital's side of a run's strategy, on one trainer's network."""

    def __init__(self, trainer: Trainer, config: AggregationConfig) -> None:
        """Find out what stays in the hospital.

        Raises:
          ModelError: the network has nothing of the kind, or a pattern of a name matches nothing.
        """
        self._trainer, self._config = trainer, config
        self._kept = (
            kept_parameters(
                trainer.network,
                trainer.layout,
                config.strategy,
                config.local_parameters,
                trainer.dummy_patient()[0][:1],
            )
            if config.traits.partial
            else None
        )

    def begin(
        self, sent: Vector, memory: Memory, data: LocalData, job: LocalJob, index: int, plainly: bool = False
    ) -> RuleSteps:
        """Return the passes of one hospital's round, from what the server sent; nothing is trained yet.

        Args:
          plainly: whether to train as with fedavg, whatever the strategy is.

        Raises:
          UpdateRejected: less was sent than the network has weights.
        """
        trainer, size = self._trainer, self._trainer.layout.size
        if len(sent) < size:
            raise UpdateRejected(f"the weights have shape {sent.shape}; this network needs ({size},)")

        def loss_of(weights: Vector) -> float:
            rng = np.random.default_rng([*job.seed_key, LOSS_DRAW])
            count = trainer.training.patches_per_patient
            drawn = (data.train_patches(index, count, rng) for index in range(data.num_train_patients))
            return float(np.mean(trainer.losses(weights, drawn)))

        rule = average if plainly else client_rule(self._config)
        return rule(RuleInput(sent, size, memory, self._config, trainer.training, job, index, loss_of, self._kept))

    def evaluated(self, memory: Memory, weights: Vector) -> Vector:
        """Return what the hospital scores and would use: its own model where the strategy gives it one."""
        return evaluated_weights(self._config, self._kept, memory, weights)

    def train(self, sent: Vector, memory: Memory, data: LocalData, job: LocalJob, index: int) -> RuleResult:
        """Train one hospital's round, pass after pass.

        Raises:
          ModelError, LabelError, NotFitForDP, UpdateRejected: what training raises.
        """
        passes = self.begin(sent, memory, data, job, index)
        following: TrainingPass | RuleResult = first_pass(passes)
        while isinstance(following, TrainingPass):
            following = advance(passes, attempt(self._trainer, following, data))
        return following


def first_pass(passes: RuleSteps) -> TrainingPass:
    """Return the first pass of a round; every rule has one."""
    return next(passes)


def advance(passes: RuleSteps, outcome: LocalOutcome) -> TrainingPass | RuleResult:
    """Go on with the outcome of the last pass; return the next one, or what the round gave."""
    try:
        return passes.send(outcome)
    except StopIteration as end:
        done: RuleResult = end.value
        return done


def attempt(trainer: Trainer, one: TrainingPass, data: LocalData) -> LocalOutcome:
    """Train a pass; of a silent one that failed nothing comes, for its failure would tell what nobody has paid for."""
    try:
        return trainer.train(one.start, data, one.job)
    except Exception:
        if not one.silent:
            raise
        log.exception("personal_model_not_trained")
        return LocalOutcome(np.zeros_like(one.start), 0, float("nan"))
