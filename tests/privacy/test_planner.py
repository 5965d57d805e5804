"""A plan meets its target and never exceeds it."""

import pytest

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.planner import (
    LARGEST_NUM_STEPS,
    SMALLEST_SIGMA,
    solve_epsilon,
    solve_noise_multiplier,
    solve_num_steps,
    solve_sample_rate,
)

DELTA = 1e-5


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"),
    [
        (0.5, 0.05, 100),
        (0.4, 1.0, 20),
        pytest.param(8.0, 0.1, 200, marks=pytest.mark.ci),
        pytest.param(2.0, 0.25, 40, marks=pytest.mark.ci),
        pytest.param(40.0, 0.2, 50, marks=pytest.mark.ci),
    ],
)
def test_noise_is_just_enough(epsilon: float, q: float, steps: int) -> None:
    sigma = solve_noise_multiplier(epsilon, DELTA, q, steps)
    assert solve_epsilon(sigma, DELTA, q, steps) <= epsilon
    assert solve_epsilon(sigma * 0.998, DELTA, q, steps) > epsilon
    assert float(f"{sigma:.5g}") == sigma


def test_steps_are_the_most_that_fit() -> None:
    steps = solve_num_steps(0.3, DELTA, 0.05, 8.0)
    assert solve_epsilon(8.0, DELTA, 0.05, steps) <= 0.3 < solve_epsilon(8.0, DELTA, 0.05, steps + 1)


def test_rate_is_the_most_that_fits() -> None:
    rate = solve_sample_rate(0.3, DELTA, 8.0, 50)
    assert solve_epsilon(8.0, DELTA, rate, 50) <= 0.3 < solve_epsilon(8.0, DELTA, rate * 1.002, 50)


@pytest.mark.ci
def test_all_directions_agree() -> None:
    sigma = solve_noise_multiplier(3.0, DELTA, 0.2, 30)
    assert solve_num_steps(3.0, DELTA, 0.2, sigma) == 30
    assert solve_sample_rate(3.0, DELTA, sigma, 30) == pytest.approx(0.2, rel=2e-3)


def test_generous_targets_end_at_the_limits() -> None:
    assert solve_noise_multiplier(1e6, DELTA, 0.1, 1) == SMALLEST_SIGMA
    assert solve_sample_rate(5.0, DELTA, 9.0, 2) == 1.0
    assert solve_num_steps(8.0, DELTA, 0.0001, 90.0) == LARGEST_NUM_STEPS


@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (lambda: solve_noise_multiplier(1e-4, 1e-12, 1.0, 10_000_000), "no noise multiplier"),
        (lambda: solve_num_steps(0.1, DELTA, 1.0, 1.0), "a single step"),
        (lambda: solve_sample_rate(0.0001, 1e-9, 0.5, 100_000), "no sample rate"),
        (lambda: solve_noise_multiplier(0.0, DELTA, 0.1, 10), "epsilon is 0.0"),
        (lambda: solve_noise_multiplier(float("nan"), DELTA, 0.1, 10), "epsilon is nan"),
        (lambda: solve_noise_multiplier(8.0, 0.0, 0.1, 10), "delta"),
        (lambda: solve_noise_multiplier(8.0, DELTA, 1.5, 10), "sample_rate"),
        (lambda: solve_noise_multiplier(8.0, DELTA, 0.1, 0), "num_steps"),
        (lambda: solve_num_steps(8.0, DELTA, 0.1, -1.0), "noise_multiplier"),
    ],
)
def test_the_impossible_is_refused_in_words(solve: object, words: str) -> None:
    with pytest.raises(PrivacyConfigError, match=words):
        solve()  # type: ignore[operator]
