"""What a search costs one data set: every trial composed, or the best of a secret number of them released alone.

The mathematics is dp-accounting's throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.accountant import (
    RENYI_ORDERS,
    Charge,
    Segment,
    check_delta,
    check_segment,
    epsilon_spent,
    merge_segments,
)

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


def worst_case_epsilon(history: Iterable[Charge], trials: Sequence[Segment], num_trials: int, delta: float) -> float:
    """Return an upper bound of epsilon after num_trials more trials, each of which may be any of `trials`.

    Where one of them has the least noise, the highest rate and the most steps, that one composed with itself is the
    worst case, by PLD. Otherwise the bound is the smaller one of such a trial made up of the worst of each, and of the
    Renyi bound that takes the costliest trial at every order.

    Args:
      history: what is charged already.
      trials: the mechanism of a whole trial, for every kind of trial that the search may draw.

    Raises:
      PrivacyConfigError: there is no trial, or a figure is out of its range.
    """
    check_delta(delta)
    kinds = merge_kinds(trials)
    if not kinds:
        raise PrivacyConfigError("a search without trials has no worst case; name at least one mechanism")
    past = tuple(history)
    worst = Segment(
        min(kind.noise_multiplier for kind in kinds),
        max(kind.sample_rate for kind in kinds),
        num_trials * max(kind.num_steps for kind in kinds),
    )
    composed = epsilon_spent((*past, worst), delta)
    if len(kinds) == 1 or any(
        kind.num_steps * num_trials == worst.num_steps and kind[:2] == worst[:2] for kind in kinds
    ):
        return composed
    if any(not isinstance(charge, Segment) for charge in past):
        return composed
    segments = merge_segments(charge for charge in past if isinstance(charge, Segment))
    costliest = min(_costliest(segments, kinds, num_trials, delta, order) for order in RENYI_ORDERS)
    return min(composed, costliest)


def merge_kinds(trials: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the different mechanisms in one fixed order.

    Raises:
      PrivacyConfigError: a figure is out of its range.
    """
    kinds = sorted(set(trials))
    for kind in kinds:
        check_segment(kind)
    return tuple(kinds)


def _costliest(
    history: Sequence[Segment], kinds: Sequence[Segment], num_trials: int, delta: float, order: float
) -> float:
    """Return the largest epsilon by Renyi accounting at one order, where the divergences of mixed trials add up."""
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    found = 0.0
    for kind in kinds:
        accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
        for segment in history:
            accountant.compose(_step(segment), segment.num_steps)
        accountant.compose(_step(kind), kind.num_steps * num_trials)
        epsilon = float(accountant.get_epsilon(delta))
        found = max(found, epsilon if not math.isnan(epsilon) else math.inf)
    return found


def selected_epsilon(trial: Segment, delta: float, mean: float, shape: float) -> float:
    """Return the epsilon of the best of a random number of trials, where that one alone is released.

    The number is drawn from a Poisson distribution (shape infinity) or a negative binomial one without zero, and kept
    secret, as are all other trials; no trial sees another. Patient-level, add/remove adjacency.

    Args:
      trial: the mechanism of a whole trial; the worst of those that the search may draw.

    Raises:
      PrivacyConfigError: a figure is out of its range.

    Source: Papernot and Steinke 2022, arXiv:2110.03620, theorems 2 and 6, as dp-accounting's RepeatAndSelectDpEvent.
    """
    from dp_accounting import dp_event
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    check_segment(trial)
    if not (mean >= 1 and shape > 0):
        raise PrivacyConfigError(f"the number of trials has mean {mean!r} and shape {shape!r}; expected >= 1 and > 0")
    accountant = RdpAccountant(RENYI_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    one = dp_event.SelfComposedDpEvent(_step(trial), trial.num_steps)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(one, mean, shape))
    return float(accountant.get_epsilon(delta))


def _step(segment: Segment) -> DpEvent:
    from dp_accounting import dp_event

    step = dp_event.GaussianDpEvent(segment.noise_multiplier)
    return step if segment.sample_rate == 1 else dp_event.PoissonSampledDpEvent(segment.sample_rate, step)
