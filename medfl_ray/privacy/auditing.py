"""How much privacy a mechanism loses at least, from what an attacker gets right about canaries.

An accountant says how much is lost at most, if the code does what the mathematics assumes. An audit attacks
the code: it looks at what was released, guesses who was in it, and turns guesses that were too good into a
lower bound on epsilon. A bound above the claim refutes the claim; a bound below it proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, norm

from medfl_ray.errors import PrivacyConfigError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FEW, SOME, ALL = 0.02, 0.2, 1.0
"""Shares of the canaries that are guessed, decided before anything is seen."""
LARGEST_EPSILON = 50.0


@dataclass(frozen=True)
class Guesses:
    """The auditor's answers on m canaries: it guessed `num_guessed` of them and `num_correct` were right."""

    num_canaries: int
    num_guessed: int
    num_correct: int


def guess(scores: Floats, included: Bools, num_guessed: int) -> Guesses:
    """Guess on the `num_guessed` canaries whose scores are furthest from 0, "in" above and "out" below, and count.

    Args:
      scores: log-likelihood ratios of "in" to "out", one per canary, [m]. Their size is how sure a guess is, so
        that the top k+ and the bottom k- are taken with k+ and k- where the surest lie.
      included: the secret coins, [m], looked at only to count.

    Raises:
      PrivacyConfigError: fewer than 1 guess or more than canaries are asked for.
    """
    if not 1 <= num_guessed <= len(scores):
        raise PrivacyConfigError(f"{num_guessed} guesses were asked for {len(scores)} canaries; give 1 to that many")
    surest = np.argsort(-np.abs(scores), kind="stable")[:num_guessed]
    return Guesses(len(scores), num_guessed, int(np.count_nonzero((scores[surest] > 0) == included[surest])))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return at most how likely so many right guesses are if the mechanism is (epsilon, delta)-DP.

    Add/remove adjacency, in the unit of a canary. With r guesses and v right ones, W binomial with r trials and
    success e^epsilon / (1 + e^epsilon), and m canaries: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2.
    """
    success = 1 / (1 + math.exp(-epsilon))
    r, v = guesses.num_guessed, guesses.num_correct
    tail = float(binom.sf(v - 1, r, success))
    if delta == 0 or v == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, success))
    slope = float(np.max(below / np.arange(1, v + 1)))
    return min(1.0, tail + 2 * guesses.num_canaries * delta * slope)


def epsilon_lower_bound(guesses: Guesses, delta: float, confidence: float) -> float:
    """Return the largest epsilon that the guesses refute: with this confidence the true one is above; 0 for none.

    The p-value is not always monotone in epsilon, so the first epsilon that is not refuted decides.

    Raises:
      PrivacyConfigError: delta or confidence is out of range.
    """
    if not 0 <= delta < 1:
        raise PrivacyConfigError(f"delta is {delta!r}; it must be 0 or above and below 1")
    if not 0 < confidence < 1:
        raise PrivacyConfigError(f"confidence is {confidence!r}; it must lie between 0 and 1, such as 0.95")

    def refuted(epsilon: float) -> bool:
        return p_value(guesses, epsilon, delta) < 1 - confidence

    step = 0.25
    low = 0.0
    if not refuted(low):
        return 0.0
    while low < LARGEST_EPSILON and refuted(low + step):
        low += step
    high = low + step
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon at one delta, and the largest that as many flawless guesses could have given."""

    delta: float
    epsilon: float
    ceiling: float
    guesses: Guesses


def audit_bounds(
    scores: Floats, included: Bools, delta: float, smaller_delta: float, confidence: float
) -> tuple[Bound, Bound]:
    """Return a lower bound at the claim's delta and one at a smaller delta; both hold together with the confidence.

    The first is for a tight bound, from the surest guesses. The second is for a refutation: at a smaller delta
    many right guesses have no other explanation than a large epsilon, so that all canaries are guessed as well. Both
    try two numbers of guesses, and each of the four gets an equal part of the error (Bonferroni).
    """
    each = 1 - (1 - confidence) / 4
    return (
        _best_bound(scores, included, (FEW, SOME), delta, each),
        _best_bound(scores, included, (SOME, ALL), smaller_delta, each),
    )


def _best_bound(scores: Floats, included: Bools, fractions: Sequence[float], delta: float, confidence: float) -> Bound:
    tried = [guess(scores, included, max(1, round(fraction * len(scores)))) for fraction in fractions]
    flawless = [Guesses(one.num_canaries, one.num_guessed, one.num_guessed) for one in tried]
    found = [epsilon_lower_bound(one, delta, confidence) for one in tried]
    best = int(np.argmax(found))
    ceiling = max(epsilon_lower_bound(one, delta, confidence) for one in flawless)
    return Bound(delta, found[best], ceiling, tried[best])


def gaussian_canary_epsilon(present: Floats, absent: Floats, delta: float) -> float:
    """Estimate epsilon from the statistics of canaries that were in and of canaries that were not.

    A statistic is a canary's direction times the released vector (or the cosine between the two: a common
    factor changes nothing). A Gaussian is fitted to each group, and the result is the larger epsilon of the two
    orders in which they can be told apart at delta. An estimate for an attacker who sees this statistic: neither a
    bound nor a test, and no confidence goes with it.

    Raises:
      PrivacyConfigError: a group has fewer than 2 canaries.

    Source: Andrew et al. 2023, arXiv:2302.03098, algorithm 2 (one run, final model).
    """
    if min(len(present), len(absent)) < 2:
        raise PrivacyConfigError("a Gaussian needs at least 2 canaries that were in and 2 that were not")
    unit = float(absent.std(ddof=1))
    shift = float(present.mean() - absent.mean())
    if unit == 0:
        return math.inf if shift else 0.0
    inside = (shift / unit, float(present.std(ddof=1)) / unit)
    return max(_gaussian_epsilon(inside, (0.0, 1.0), delta), _gaussian_epsilon((0.0, 1.0), inside, delta))


def _gaussian_epsilon(one: tuple[float, float], other: tuple[float, float], delta: float) -> float:
    """Return the epsilon at which the hockey-stick divergence between two Gaussians (mean, deviation) is delta."""
    if one[1] == 0:
        return math.inf
    if _hockey_stick(one, other, 0.0) <= delta:
        return 0.0
    high = 1.0
    while _hockey_stick(one, other, high) > delta:
        high *= 2
        if high > 1e6:
            return math.inf
    return float(brentq(lambda epsilon: _hockey_stick(one, other, epsilon) - delta, 0.0, high, xtol=1e-6))


def _hockey_stick(one: tuple[float, float], other: tuple[float, float], epsilon: float) -> float:
    """Return P(A) - e^epsilon Q(A) on the set A where the log density ratio of P to Q, a parabola, is above epsilon."""
    (mean, deviation), (other_mean, other_deviation) = one, other
    a = 0.5 / other_deviation**2 - 0.5 / deviation**2
    b = mean / deviation**2 - other_mean / other_deviation**2
    c = 0.5 * (other_mean / other_deviation) ** 2 - 0.5 * (mean / deviation) ** 2
    c += math.log(other_deviation / deviation) - epsilon
    edges = [-math.inf, *_roots(a, b, c), math.inf]
    total = 0.0
    for low, high in pairwise(edges):
        inside = _between(low, high)
        if (a * inside + b) * inside + c > 0:
            # In logarithms, since e^epsilon alone may be too large for a float.
            total += _mass(low, high, one) - math.exp(min(700.0, epsilon + _log(_mass(low, high, other))))
    return total


def _roots(a: float, b: float, c: float) -> list[float]:
    if abs(a) < 1e-12:
        return [-c / b] if b else []
    square = b * b - 4 * a * c
    if square <= 0:
        return []
    # The stable form: no difference of two nearly equal numbers where a is small.
    q = -0.5 * (b + math.copysign(math.sqrt(square), b))
    return sorted([q / a, c / q]) if q else [0.0]


def _between(low: float, high: float) -> float:
    if math.isinf(low) and math.isinf(high):
        return 0.0
    if math.isinf(low):
        return high - 1.0
    return low + 1.0 if math.isinf(high) else (low + high) / 2


def _mass(low: float, high: float, gaussian: tuple[float, float]) -> float:
    mean, deviation = gaussian
    a, b = (low - mean) / deviation, (high - mean) / deviation
    if a > 0:  # the upper tail, where differences of cdf would cancel
        return float(norm.sf(a) - norm.sf(b))
    return float(norm.cdf(b) - norm.cdf(a))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
