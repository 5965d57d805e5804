"""What a history of DP-SGD steps costs: patient-level epsilon by privacy loss distributions, exact where q = 1.

The distributions come from Google's dp-accounting; nothing of their mathematics is written here.
Equal segments are merged before they are accounted and results are kept, so that a thousand
hospitals with the same history cost as much as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from medfl_ray.errors import PrivacyConfigError

if TYPE_CHECKING:
    from dp_accounting.privacy_accountant import PrivacyAccountant

UNIT = "patient"
ADJACENCY = "add_remove"
GRID = 1e-4
RENYI_ORDERS = (*range(2, 64), *range(64, 257, 8), 384, 512, 1024, 2048)
COARSE_FROM_EPSILON = 4.0
ROOT_TOLERANCE = 1e-12
LARGEST_PLD_EPSILON = 100.0
"""Above this an epsilon promises nothing, and the distributions need gigabytes: the looser Renyi bound is given."""


class Segment(NamedTuple):
    """num_steps steps with one noise_multiplier (sigma, over the clip norm) and one Poisson sample_rate (q)."""

    noise_multiplier: float
    sample_rate: float
    num_steps: int


class TreeSegment(NamedTuple):
    """num_trees trees of num_steps rounds each, every hospital at most once in a tree, noise_multiplier per node."""

    noise_multiplier: float
    num_steps: int
    num_trees: int = 1


Charge = Segment | TreeSegment


def epsilon_spent(history: Iterable[Charge], delta: float) -> float:
    """Return the epsilon of a history, under add/remove adjacency; 0 for an empty one.

    Its unit is what the sample rate draws and the clip norm bounds: a patient, or a hospital. With a tree in the
    history the adjacency is zero-out: see `tree_epsilon`.

    Noise multiplier, rate and steps may change from segment to segment. The result is an upper bound:
    it never understates, and it never falls when a step is added.

    Args:
      history: segments in any order; their order does not change the result.
      delta: failure probability in (0, 1); keep it below 1 / num_patients.

    Raises:
      PrivacyConfigError: delta, a noise multiplier, a rate or a number of steps is out of its range.

    Source: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 (PLD);
    Balle and Wang 2018, arXiv:1805.06530 (exact Gaussian, where every segment takes all patients).
    """
    check_delta(delta)
    charges = tuple(history)
    trees = [charge for charge in charges if isinstance(charge, TreeSegment)]
    merged = merge_segments(charge for charge in charges if isinstance(charge, Segment))
    if trees:
        return tree_epsilon(trees, merged, delta)
    return _epsilon(merged, delta) if merged else 0.0


def tree_epsilon(trees: Iterable[TreeSegment], others: Iterable[Segment], delta: float) -> float:
    """Return the epsilon of trees together with sampled steps, under zero-out adjacency.

    Zero-out: a hospital's update is there, or zeros are in its place; its turn in the tree stays. It is the relation
    for which dp-accounting has its tree event, and Renyi the only accountant that takes it.

    Raises:
      PrivacyConfigError: a noise multiplier or a number of rounds is out of its range.

    Source: Kairouz et al. 2021, arXiv:2103.00039, appendix D.
    """
    from dp_accounting import dp_event
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    accountant = RdpAccountant(RENYI_ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    for tree in trees:
        check_charge(tree)
        event = dp_event.SingleEpochTreeAggregationDpEvent(tree.noise_multiplier, tree.num_steps)
        accountant.compose(event, tree.num_trees)
    return _compose(accountant, merge_segments(others), delta)


def merge_segments(history: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the history with equal mechanisms joined, empty segments dropped and in one fixed order.

    Raises:
      PrivacyConfigError: a noise multiplier, a rate or a number of steps is out of its range.
    """
    steps: dict[tuple[float, float], int] = {}
    for segment in history:
        check_segment(segment)
        key = (float(segment.noise_multiplier), float(segment.sample_rate))
        steps[key] = steps.get(key, 0) + int(segment.num_steps)
    return tuple(Segment(*key, count) for key, count in sorted(steps.items()) if count)


def check_delta(delta: float) -> None:
    """Refuse a delta that is no probability between 0 and 1.

    Raises:
      PrivacyConfigError: delta is 0 or below, 1 or above, or no number.
    """
    if not 0 < delta < 1:
        raise PrivacyConfigError(f"delta is {delta!r}; it must lie between 0 and 1, and below 1 / num_patients")


def check_segment(segment: Segment) -> None:
    """Refuse a segment that no accountant could account.

    Raises:
      PrivacyConfigError: the noise multiplier, the rate or the number of steps is out of its range.
    """
    sigma, q, steps = segment
    if not (math.isfinite(sigma) and sigma > 0):
        raise PrivacyConfigError(f"noise_multiplier is {sigma!r}; it must be a number above 0, else nothing is private")
    if not 0 < q <= 1:
        raise PrivacyConfigError(f"sample_rate is {q!r}; it must lie above 0 and be at most 1")
    if steps != int(steps) or steps < 0:
        raise PrivacyConfigError(f"num_steps is {steps!r}; it must be a whole number, 0 or more")


def check_charge(charge: Charge) -> None:
    """Refuse a segment or a tree that no accountant could account.

    Raises:
      PrivacyConfigError: a figure is out of its range.
    """
    if isinstance(charge, Segment):
        check_segment(charge)
        return
    check_segment(Segment(charge.noise_multiplier, 1.0, charge.num_steps))
    if charge.num_steps < 1 or charge.num_trees < 1:
        raise PrivacyConfigError(f"a tree of {charge.num_steps!r} rounds cannot be accounted; it has at least one")


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Segment, ...], delta: float, grid: float = GRID) -> float:
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    if all(segment.sample_rate == 1 for segment in history):
        return _exact_gaussian_epsilon(history, delta)
    looser = renyi_epsilon(history, delta)
    if looser > LARGEST_PLD_EPSILON:
        return looser
    return min(looser, _compose(PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, grid), history, delta))


def _exact_gaussian_epsilon(history: tuple[Segment, ...], delta: float) -> float:
    """Return the epsilon of steps that take every patient: together they are one Gaussian mechanism."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    precision = math.fsum(num_steps / sigma**2 for sigma, _, num_steps in history)
    epsilon = float(get_epsilon_gaussian(1 / math.sqrt(precision), delta, ROOT_TOLERANCE))
    return epsilon + ROOT_TOLERANCE if epsilon > 0 else 0.0


def search_epsilon(segment: Segment, delta: float, target: float) -> float:
    """Return one segment's epsilon for a search towards a target, on a grid that is coarse where that is harmless.

    Coarser means a little larger and several times quicker; small targets need the fine grid and are quick on it.
    """
    merged = merge_segments([segment])
    return _epsilon(merged, delta, 10 * GRID if target >= COARSE_FROM_EPSILON else GRID)


def renyi_epsilon(history: Iterable[Segment], delta: float) -> float:
    """Return the looser epsilon of Renyi accounting: a cross-check, and an upper bound that is always quick.

    Source: Mironov, Talwar, Zhang 2019, arXiv:1908.10530.
    """
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    return _compose(RdpAccountant(RENYI_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE), history, delta)


def _compose(accountant: PrivacyAccountant, history: Iterable[Segment], delta: float) -> float:
    from dp_accounting import dp_event

    for sigma, q, num_steps in history:
        step: dp_event.DpEvent = dp_event.GaussianDpEvent(sigma)
        if q < 1:
            step = dp_event.PoissonSampledDpEvent(q, step)
        accountant.compose(step, num_steps)
    return float(accountant.get_epsilon(delta))
