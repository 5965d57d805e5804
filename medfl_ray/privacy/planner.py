"""Any one of noise multiplier, epsilon, steps and sample rate, solved from the other three."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.accountant import Segment, epsilon_spent, rough_epsilon

SMALLEST_SIGMA = 0.05
LARGEST_SIGMA = 1e5
LARGEST_STEPS = 10_000_000
SIGMA_DIGITS = 4
RATE_DIGITS = 6


@lru_cache(maxsize=1024)
def solve_noise_multiplier(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return the smallest noise multiplier with which num_steps steps cost at most epsilon (patient, add/remove).

    It is rounded up to four decimals, so that the epsilon reached never exceeds the target.

    Raises:
      PrivacyConfigError: a value is out of its range, or no noise multiplier up to 100,000 suffices.
    """
    _check_target(epsilon)

    def cost(sigma: float, exact: bool) -> float:
        history = (Segment(sigma, sample_rate, num_steps),)
        return epsilon_spent(history, delta) if exact else rough_epsilon(history, delta)

    if cost(SMALLEST_SIGMA, exact=True) <= epsilon:
        return SMALLEST_SIGMA
    if cost(LARGEST_SIGMA, exact=False) > epsilon:
        raise PrivacyConfigError(
            f"no noise multiplier up to {LARGEST_SIGMA:g} keeps {num_steps} steps at sample_rate={sample_rate:g} within "
            f"epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). Raise epsilon or lower the steps."
        )
    return _smallest_fitting(cost, epsilon, SMALLEST_SIGMA, LARGEST_SIGMA, 10.0**-SIGMA_DIGITS)


def solve_epsilon(noise_multiplier: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return the epsilon (patient, add/remove) of num_steps steps.

    Raises:
      PrivacyConfigError: a value is out of its range.
    """
    return epsilon_spent((Segment(noise_multiplier, sample_rate, num_steps),), delta)


def solve_num_steps(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """Return the largest number of steps that costs at most epsilon (patient, add/remove), at most ten million.

    Raises:
      PrivacyConfigError: a value is out of its range, or not even one step fits.
    """
    _check_target(epsilon)

    def fits(num_steps: int) -> bool:
        return solve_epsilon(noise_multiplier, delta, sample_rate, num_steps) <= epsilon

    if not fits(1):
        raise PrivacyConfigError(
            f"a single step with noise_multiplier={noise_multiplier:g} at sample_rate={sample_rate:g} costs more than "
            f"epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). Raise the noise or epsilon."
        )
    below, above = 1, 2
    while above < LARGEST_STEPS and fits(above):
        below, above = above, 2 * above
    if above >= LARGEST_STEPS and fits(LARGEST_STEPS):
        return LARGEST_STEPS
    above = min(above, LARGEST_STEPS)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def solve_sample_rate(epsilon: float, delta: float, noise_multiplier: float, num_steps: int) -> float:
    """Return the largest sample rate, rounded down to six decimals, at which num_steps steps cost at most epsilon.

    Raises:
      PrivacyConfigError: a value is out of its range, or no rate from 0.000001 up is small enough.
    """
    _check_target(epsilon)

    def cost(rate: float, exact: bool) -> float:
        history = (Segment(noise_multiplier, rate, num_steps),)
        return epsilon_spent(history, delta) if exact else rough_epsilon(history, delta)

    if cost(1.0, exact=True) <= epsilon:
        return 1.0
    grain = 10.0**-RATE_DIGITS
    if cost(grain, exact=True) > epsilon:
        raise PrivacyConfigError(
            f"no sample rate from {grain:g} up keeps {num_steps} steps with noise_multiplier={noise_multiplier:g} within "
            f"epsilon={epsilon:g} (patient-level, add/remove, delta={delta:g}). Raise the noise or lower the steps."
        )
    # A rate costs more the larger it is: search on its inverse, which falls like the noise's cost.
    return _largest_fitting(cost, epsilon, grain)


def _smallest_fitting(
    cost: Callable[[float, bool], float], target: float, low: float, high: float, grain: float
) -> float:
    """Return the smallest multiple of grain in (low, high] whose exact cost, which falls, is at most the target."""
    while high - low > grain / 2:
        middle = math.sqrt(low * high) if high > 1.5 * low else (low + high) / 2
        low, high = (low, middle) if cost(middle, False) <= target else (middle, high)
    count = math.ceil(high / grain)
    while cost(round((count - 1) * grain, SIGMA_DIGITS), True) <= target:
        count -= 1
    while cost(round(count * grain, SIGMA_DIGITS), True) > target:
        count += 1
    return round(count * grain, SIGMA_DIGITS)


def _largest_fitting(cost: Callable[[float, bool], float], target: float, grain: float) -> float:
    low, high = 1, round(1 / grain)
    while high - low > 1:
        middle = round(math.sqrt(low * high)) if high > 2 * low + 2 else (low + high) // 2
        low, high = (middle, high) if cost(middle * grain, False) <= target else (low, middle)
    while cost(round((low + 1) * grain, RATE_DIGITS), True) <= target:
        low += 1
    while low > 1 and cost(round(low * grain, RATE_DIGITS), True) > target:
        low -= 1
    return round(low * grain, RATE_DIGITS)


def _check_target(epsilon: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyConfigError(f"epsilon is {epsilon!r}; it must be a number above 0")
