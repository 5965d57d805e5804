"""Any one of noise multiplier, epsilon, steps and sample rate, solved from the other three.

Every search starts from the Renyi bound, which is quick and errs on the safe side, and ends by asking
the accountant itself, so that a plan never costs more than its target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.accountant import (
    Segment,
    TreeSegment,
    check_delta,
    check_segment,
    epsilon_spent,
    renyi_epsilon,
    search_epsilon,
)

SMALLEST_SIGMA, LARGEST_SIGMA = 0.05, 1e5
SMALLEST_RATE = 1e-6
LARGEST_NUM_STEPS = 10_000_000
SIGNIFICANT_DIGITS = 5
TOLERANCE = 1e-5
STRIDE = 1.25

Cost = Callable[[float], float]


@lru_cache(maxsize=1024)
def solve_noise_multiplier(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return the smallest noise multiplier with which num_steps steps cost at most epsilon (patient, add/remove).

    It is rounded up to five digits, so that the epsilon reached never exceeds the target.

    Raises:
      PrivacyConfigError: a value is out of its range, or no noise multiplier up to 100,000 suffices.
    """
    _check(epsilon, delta, Segment(1.0, sample_rate, num_steps))

    def quick(sigma: float) -> float:
        return renyi_epsilon((Segment(sigma, sample_rate, num_steps),), delta)

    def close(sigma: float) -> float:
        return search_epsilon(Segment(sigma, sample_rate, num_steps), delta, epsilon)

    def exact(sigma: float) -> float:
        return solve_epsilon(sigma, delta, sample_rate, num_steps)

    if quick(SMALLEST_SIGMA) <= epsilon:
        return SMALLEST_SIGMA
    if quick(LARGEST_SIGMA) > epsilon:
        raise PrivacyConfigError(
            f"no noise multiplier up to {LARGEST_SIGMA:g} keeps {num_steps} steps at sample_rate={sample_rate:g} "
            f"within epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). Raise epsilon or lower "
            "the steps."
        )
    enough = _root(quick, epsilon, SMALLEST_SIGMA, LARGEST_SIGMA)
    return _first_fitting(exact, epsilon, _crossing(close, epsilon, enough, 1 / STRIDE, SMALLEST_SIGMA), away=1)


def solve_epsilon(noise_multiplier: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return the epsilon (patient, add/remove) of num_steps steps.

    Raises:
      PrivacyConfigError: a value is out of its range.
    """
    return epsilon_spent((Segment(noise_multiplier, sample_rate, num_steps),), delta)


def solve_tree_epsilon(noise_multiplier: float, delta: float, num_rounds: int, rounds_per_tree: int) -> float:
    """Return the epsilon (hospital, zero-out) of tree aggregation, a new tree every rounds_per_tree rounds.

    Raises:
      PrivacyConfigError: a value is out of its range.
    """
    whole, rest = divmod(num_rounds, rounds_per_tree)
    trees = [TreeSegment(noise_multiplier, rounds_per_tree, whole)] if whole else []
    if rest:
        trees.append(TreeSegment(noise_multiplier, rest))
    return epsilon_spent(trees, delta)


@lru_cache(maxsize=1024)
def solve_tree_noise_multiplier(epsilon: float, delta: float, num_rounds: int, rounds_per_tree: int) -> float:
    """Return the smallest noise multiplier per node with which the trees cost at most epsilon (hospital, zero-out).

    Raises:
      PrivacyConfigError: a value is out of its range, or no noise multiplier up to 100,000 suffices.
    """
    _check(epsilon, delta, Segment(1.0, 1.0, min(num_rounds, rounds_per_tree)))

    def cost(sigma: float) -> float:
        return solve_tree_epsilon(sigma, delta, num_rounds, rounds_per_tree)

    if cost(LARGEST_SIGMA) > epsilon:
        raise PrivacyConfigError(
            f"no noise multiplier up to {LARGEST_SIGMA:g} keeps {num_rounds} rounds in trees of {rounds_per_tree} "
            f"within epsilon={epsilon:g} (hospital-level, zero-out, delta={delta:g}). Raise epsilon or lower the "
            "rounds."
        )
    if cost(SMALLEST_SIGMA) <= epsilon:
        return SMALLEST_SIGMA
    return _first_fitting(cost, epsilon, _root(cost, epsilon, SMALLEST_SIGMA, LARGEST_SIGMA), away=1)


def solve_num_steps(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """Return the largest number of steps that costs at most epsilon (patient, add/remove), at most ten million.

    Above 99,999 it is rounded down to five digits.

    Raises:
      PrivacyConfigError: a value is out of its range, or not even one step fits.
    """
    _check(epsilon, delta, Segment(noise_multiplier, sample_rate, 1))

    def quick(num_steps: float) -> float:
        return renyi_epsilon((Segment(noise_multiplier, sample_rate, max(1, round(num_steps))),), delta)

    def close(num_steps: float) -> float:
        return search_epsilon(Segment(noise_multiplier, sample_rate, max(1, round(num_steps))), delta, epsilon)

    def fits(num_steps: int) -> bool:
        return solve_epsilon(noise_multiplier, delta, sample_rate, num_steps) <= epsilon

    if not fits(1):
        raise PrivacyConfigError(
            f"a single step with noise_multiplier={noise_multiplier:g} at sample_rate={sample_rate:g} costs more than "
            f"epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). Raise the noise or epsilon."
        )
    if quick(LARGEST_NUM_STEPS) <= epsilon:
        return LARGEST_NUM_STEPS
    enough = 1.0 if quick(1) > epsilon else max(1.0, _root(quick, epsilon, 1.0, LARGEST_NUM_STEPS) / STRIDE)
    steps = min(LARGEST_NUM_STEPS, max(1, round(_crossing(close, epsilon, enough, STRIDE**2, LARGEST_NUM_STEPS))))
    grain: int = 10 ** max(0, len(str(steps)) - SIGNIFICANT_DIGITS)
    steps -= steps % grain
    while grain == 1 and fits(steps + 1):
        steps += 1
    while not fits(steps):
        steps -= grain
    return steps


def solve_sample_rate(epsilon: float, delta: float, noise_multiplier: float, num_steps: int) -> float:
    """Return the largest sample rate, rounded down to five digits, at which num_steps steps cost at most epsilon.

    Raises:
      PrivacyConfigError: a value is out of its range, or no rate from 0.000001 up is small enough.
    """
    _check(epsilon, delta, Segment(noise_multiplier, 1.0, num_steps))

    def close(rate: float) -> float:
        return search_epsilon(Segment(noise_multiplier, rate, num_steps), delta, epsilon)

    def exact(rate: float) -> float:
        return solve_epsilon(noise_multiplier, delta, rate, num_steps)

    if exact(1.0) <= epsilon:
        return 1.0
    if exact(SMALLEST_RATE) > epsilon:
        raise PrivacyConfigError(
            f"no sample rate from {SMALLEST_RATE:g} up keeps {num_steps} steps with noise_multiplier="
            f"{noise_multiplier:g} within epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). "
            "Raise the noise or lower the steps."
        )
    return _first_fitting(exact, epsilon, _root(close, epsilon, SMALLEST_RATE, 1.0), away=-1)


def _crossing(cost: Cost, target: float, fitting: float, factor: float, limit: float) -> float:
    """Walk by a factor from a value that fits to one that no longer does, and return where the target is met."""
    outside = fitting * factor
    while cost(outside) <= target:
        if (outside >= limit) if factor > 1 else (outside <= limit):
            return limit
        fitting, outside = outside, outside * factor
    return _root(cost, target, min(fitting, outside), max(fitting, outside))


def _root(cost: Cost, target: float, low: float, high: float) -> float:
    """Return where a monotone cost meets the target, to a relative tolerance; both scales are logarithmic."""
    from scipy.optimize import brentq

    def excess(position: float) -> float:
        return math.log(max(cost(math.exp(position)), 1e-300) / target)

    return math.exp(brentq(excess, math.log(low), math.log(high), xtol=TOLERANCE))


def _first_fitting(cost: Cost, target: float, near: float, away: int) -> float:
    """Return the first value of few digits, from `near` away on the safe side, whose cost is at most the target."""
    digits = SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(near))
    scaled = near * 10.0**digits
    count = math.ceil(scaled) if away > 0 else math.floor(scaled)
    while cost(round(count * 10.0**-digits, digits)) > target:
        count += away
    return round(count * 10.0**-digits, digits)


def _check(epsilon: float, delta: float, segment: Segment) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyConfigError(f"epsilon is {epsilon!r}; it must be a number above 0")
    if segment.num_steps < 1:
        raise PrivacyConfigError(f"num_steps is {segment.num_steps!r}; plan at least one step")
    check_delta(delta)
    check_segment(segment)
