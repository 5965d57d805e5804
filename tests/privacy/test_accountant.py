"""Accounting against published figures and against two other accountants."""

import itertools
import math
import warnings

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRdp
from sampling import sampled
from scipy.optimize import brentq
from scipy.stats import norm

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.accountant import (
    LARGEST_PLD_EPSILON,
    Segment,
    epsilon_spent,
    merge_segments,
    renyi_epsilon,
)

DELTA = 1e-5
SETTINGS = [
    *itertools.product((0.8, 1.0, 1.5, 3.0), (0.02, 0.1, 0.3), (20, 200)),
    *itertools.product((0.9, 1.2, 2.0, 4.0, 8.0), (0.005, 0.01, 0.05, 0.15), (1000,)),
    *itertools.product((1.2, 2.0, 4.0, 8.0), (0.4, 0.7), (100,)),
]


def exact_gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8, solved for epsilon."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return float(brentq(excess, 1e-9, 200))


def test_one_gaussian_step_has_the_published_epsilon() -> None:
    assert epsilon_spent([Segment(1.0, 1.0, 1)], DELTA) == pytest.approx(4.377, abs=1e-3)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 4), (5.0, 50), (10.0, 7)])
def test_without_sampling_it_is_the_exact_gaussian(sigma: float, steps: int) -> None:
    exact = exact_gaussian_epsilon(sigma / math.sqrt(steps), DELTA)
    assert epsilon_spent([Segment(sigma, 1.0, steps)], DELTA) == pytest.approx(exact, abs=1e-8)


def test_without_sampling_changing_noise_is_one_exact_gaussian() -> None:
    history = [Segment(2.0, 1.0, 4), Segment(5.0, 1.0, 50), Segment(0.9, 1.0, 1)]
    together = 1 / math.sqrt(sum(steps / sigma**2 for sigma, _, steps in history))
    assert epsilon_spent(history, DELTA) == pytest.approx(exact_gaussian_epsilon(together, DELTA), abs=1e-8)


@pytest.mark.parametrize(("sigma", "steps"), [(0.01, 1), (0.5, 10_000), (1e5, 1)])
def test_the_exact_gaussian_holds_at_the_edges(sigma: float, steps: int) -> None:
    epsilon = epsilon_spent([Segment(sigma, 1.0, steps)], DELTA)
    assert 0 <= epsilon < math.inf
    assert epsilon <= renyi_epsilon([Segment(sigma, 1.0, steps)], DELTA)
    assert epsilon <= epsilon_spent([Segment(sigma, 1.0, steps + 1)], DELTA)


def test_one_sampled_segment_among_full_ones_is_composed() -> None:
    """Neither exact nor sampled alone: the mixture costs more than its parts and no more than PRV says."""
    full, sampled = Segment(6.0, 1.0, 3), Segment(2.0, 0.1, 20)
    ours = epsilon_spent([full, sampled], DELTA)
    assert ours > max(epsilon_spent([full], DELTA), epsilon_spent([sampled], DELTA))
    assert 0 <= prv_epsilon([full, sampled]) - ours <= 0.02


def test_renyi_pin() -> None:
    """Published figure of Opacus' Renyi accountant with its own orders; ours has other orders, hence 2e-3."""
    accountant = OpacusRdp()
    accountant.history = [(1.5, 0.04, 2250)]
    assert accountant.get_epsilon(DELTA) == pytest.approx(7.32911117143, abs=1e-6)
    assert renyi_epsilon([Segment(1.5, 0.04, 2250)], DELTA) == pytest.approx(7.32911117143, abs=2e-3)


def test_prv_pin() -> None:
    """Published figure of Opacus' PRV accountant with its own error bounds (0.01 in epsilon, delta / 1000)."""
    accountant = PRVAccountant()
    accountant.history = [(1.5, 0.04, 2249)]
    published = accountant.get_epsilon(DELTA)
    assert published == pytest.approx(6.777395712, abs=1e-6)
    assert 0 <= published - epsilon_spent([Segment(1.5, 0.04, 2249)], DELTA) <= 0.02


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.1, 100), (2.0, 0.25, 60), (0.8, 0.02, 300)])
def test_prv_and_renyi_bound_it_from_above(sigma: float, q: float, steps: int) -> None:
    check_against_the_others(sigma, q, steps)


@pytest.mark.ci
def test_prv_and_renyi_bound_it_from_above_in_todays_part_of_the_settings() -> None:
    for sigma, q, steps in sampled(SETTINGS, 4):
        check_against_the_others(sigma, q, steps)


@pytest.mark.long
@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS)
def test_prv_and_renyi_bound_it_from_above_everywhere(sigma: float, q: float, steps: int) -> None:
    check_against_the_others(sigma, q, steps)


def test_the_cross_checks_cover_fifty_settings() -> None:
    assert len(set(SETTINGS)) >= 50


def check_against_the_others(sigma: float, q: float, steps: int) -> None:
    ours = epsilon_spent([Segment(sigma, q, steps)], DELTA)
    assert ours < LARGEST_PLD_EPSILON
    assert renyi_epsilon([Segment(sigma, q, steps)], DELTA) >= ours
    assert 0 <= prv_epsilon([Segment(sigma, q, steps)]) - ours <= 0.02


def prv_epsilon(history: list[Segment]) -> float:
    accountant = PRVAccountant()
    accountant.history = [tuple(segment) for segment in history]
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # it takes log(1 - q), also of q = 1
        # Its grid is laid out by a Renyi bound of few orders, which it finds wide; the result is no worse for it.
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha", UserWarning)
        return float(accountant.get_epsilon(DELTA))


@pytest.mark.ci
@pytest.mark.parametrize(
    "history",
    [
        [Segment(1.5, 0.1, 50), Segment(2.0, 0.05, 100), Segment(3.0, 0.5, 2)],
        [Segment(1.2, 0.02, 200), Segment(1.2, 0.2, 10)],  # the rate alone changes
        [Segment(4.0, 0.3, 20), Segment(1.0, 0.3, 1)],  # the noise alone changes
    ],
)
def test_a_changing_mechanism_is_composed(history: list[Segment]) -> None:
    ours = epsilon_spent(history, DELTA)
    assert 0 <= prv_epsilon(history) - ours <= 0.02
    assert renyi_epsilon(history, DELTA) >= ours
    assert ours > max(epsilon_spent([segment], DELTA) for segment in history)


def test_order_and_splitting_do_not_matter() -> None:
    a, b = Segment(1.5, 0.1, 30), Segment(2.0, 0.2, 10)
    parts = [Segment(1.5, 0.1, 10), b, Segment(1.5, 0.1, 0), Segment(1.5, 0.1, 20)]
    assert merge_segments(parts) == merge_segments([b, a]) == (a, b)
    assert epsilon_spent(parts, DELTA) == epsilon_spent([a, b], DELTA)


@settings(max_examples=5, deadline=None)
@given(
    sigma=st.floats(6, 12),
    q=st.floats(0.01, 1),
    steps=st.integers(1, 40),
    more=st.integers(1, 20),
    other=st.floats(6, 12),
)
def test_epsilon_never_falls(sigma: float, q: float, steps: int, more: int, other: float) -> None:
    before = epsilon_spent([Segment(sigma, q, steps)], DELTA)
    assert epsilon_spent([Segment(sigma, q, steps + more)], DELTA) >= before
    assert epsilon_spent([Segment(sigma, q, steps), Segment(other, q, more)], DELTA) >= before
    assert epsilon_spent([Segment(sigma, q, steps)], DELTA / 10) >= before


def test_hopeless_settings_are_bounded_in_no_time() -> None:
    nearly_no_noise = [Segment(0.01, 0.5, 100_000)]
    assert LARGEST_PLD_EPSILON < epsilon_spent(nearly_no_noise, DELTA) < math.inf


def test_nothing_done_costs_nothing() -> None:
    assert epsilon_spent([], DELTA) == 0.0
    assert epsilon_spent([Segment(1.0, 0.5, 0)], DELTA) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyConfigError, match="delta"):
        epsilon_spent([Segment(1.0, 0.5, 1)], delta)


@pytest.mark.parametrize(
    ("segment", "what"),
    [
        (Segment(0.0, 0.5, 1), "noise_multiplier"),
        (Segment(-1.0, 0.5, 1), "noise_multiplier"),
        (Segment(math.nan, 0.5, 1), "noise_multiplier"),
        (Segment(math.inf, 0.5, 1), "noise_multiplier"),
        (Segment(1.0, 0.0, 1), "sample_rate"),
        (Segment(1.0, 1.1, 1), "sample_rate"),
        (Segment(1.0, math.nan, 1), "sample_rate"),
        (Segment(1.0, 0.5, -1), "num_steps"),
        (Segment(1.0, 0.5, 1.5), "num_steps"),  # type: ignore[arg-type]
    ],
)
def test_impossible_segment_is_refused(segment: Segment, what: str) -> None:
    with pytest.raises(PrivacyConfigError, match=what):
        epsilon_spent([segment], DELTA)


def test_our_renyi_bound_is_that_of_the_library_on_its_own_orders() -> None:
    from dp_accounting import dp_event

    library = RdpAccountant()
    library.compose(dp_event.GaussianDpEvent(2.0), 10)
    ours = renyi_epsilon([Segment(2.0, 1.0, 10)], DELTA)
    assert library.get_epsilon(DELTA) <= ours <= library.get_epsilon(DELTA) * 1.02
