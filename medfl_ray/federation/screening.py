"""Judging one update before anything of it is summed: pure checks, and for each that fails the reason.

What is checked depends on public facts alone: the plan, the network's layout, the hospital's declared weight and the
norm of the weights that the round started from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from medfl_ray import params
from medfl_ray.messages import ClientUpdate, RoundPlan

HUGE = 1000.0
"""An update this many times as long as the weights, or as 1 where they are shorter, comes from a fault."""
ROUNDED = 1e-5
"""A vector shortened to a norm and rounded to float32 may be longer by this share of it."""


@dataclass(frozen=True)
class Expected:
    """What the updates of a round have to fit.

    Args:
      weight: public aggregation weight of each hospital that may be asked.
      weights_norm: Euclidean norm of the round's weights.
      extra: values of an update beyond those of the layout, which the strategy asks for.
      max_update_norm: longest change of the weights that is taken, None for any.
      may_be_zero: whether an update that changes nothing is taken; under hospital-level DP saying that one is zero
        would tell of the hospital's data what nobody has paid for.
    """

    plan: RoundPlan
    layout: params.Layout
    aggregation_weights: Mapping[str, int]
    weights_norm: float
    may_be_zero: bool = False
    extra: int = 0
    max_update_norm: float | None = None

    @property
    def size(self) -> int:
        """Number of values of an update."""
        return self.layout.size + self.extra


def why_rejected(update: ClientUpdate, expected: Expected, delivered: Collection[str]) -> str | None:
    """Return why an update is not summed, or None where it is sound; `delivered` are those already in the sum."""
    plan = expected.plan
    if (update.round, update.attempt) != (plan.round, plan.attempt):
        return (
            f"the update is of round {update.round}, attempt {update.attempt}; "
            f"this is round {plan.round}, attempt {plan.attempt}"
        )
    if update.hospital not in plan.hospitals:
        return "the update comes from a hospital that was not asked"
    if update.hospital in delivered:
        return "the hospital has already delivered an update in this round"
    return _why_other_work(update, expected) or _why_other_vector(update, expected) or _why_unsound(update, expected)


def _why_other_work(update: ClientUpdate, expected: Expected) -> str | None:
    """Compare what the hospital says it did with what the plan asked for and its policy declares."""
    steps, weight = expected.plan.num_steps[update.hospital], expected.aggregation_weights[update.hospital]
    if update.num_steps != steps:
        return f"the update is of {update.num_steps} steps; the plan asks for {steps}"
    if update.aggregation_weight != weight:
        return f"the update claims weight {update.aggregation_weight}; the hospital's public weight is {weight}"
    return None


def _why_other_vector(update: ClientUpdate, expected: Expected) -> str | None:
    delta, layout = update.delta, expected.layout
    if update.layout_checksum != layout.checksum:
        return "the update's layout is not that of the run's network"
    if not isinstance(delta, np.ndarray) or delta.dtype != np.float32:
        kind = delta.dtype if isinstance(delta, np.ndarray) else type(delta).__name__
        return f"the update's values are {kind}; expected float32"
    if delta.shape != (expected.size,):
        return f"the update has shape {delta.shape}, not the layout's ({expected.size},); it was cut off or reshaped"
    return None


def _why_unsound(update: ClientUpdate, expected: Expected) -> str | None:
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(update.delta, update.delta))
    if not np.isfinite(square) and not np.isfinite(update.delta).all():
        kind = "NaN" if np.isnan(update.delta).any() else "infinite"
        return f"the update holds {kind} values, so it is not finite"
    norm = params.norm(update.delta) if not np.isfinite(square) or square == 0.0 else square**0.5
    if norm == 0.0 and not expected.may_be_zero:
        return "the update is zero everywhere; the hospital has not trained"
    limit = HUGE * max(1.0, expected.weights_norm)
    if norm > limit:
        return f"the update's norm is {norm:.3g}, more than {HUGE:g} times that of the weights, so a fault made it"
    if expected.max_update_norm is not None:
        own = params.norm(update.delta[: expected.layout.size])
        if own > expected.max_update_norm * (1 + ROUNDED):
            return (
                f"the update's norm is {own:.6g}, above aggregation.max_update_norm {expected.max_update_norm:g}, "
                "which every hospital keeps to"
            )
    return None
