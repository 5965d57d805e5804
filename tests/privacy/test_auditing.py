"""Lower bounds on epsilon: right by hand, never above an honest claim, above a dishonest one."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.studies.auditing import AuditSubject, audit_mechanism
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.privacy.auditing import (
    Guesses,
    audit_bounds,
    epsilon_lower_bound,
    gaussian_canary_epsilon,
    guess,
    p_value,
)
from medfl_ray.privacy.canaries import log_likelihood_ratio, run_canaries
from medfl_ray.privacy.dpsgd import PatientGradientSum
from medfl_ray.privacy.noise import GaussianNoise
from medfl_ray.privacy.planner import solve_noise_multiplier
from medfl_ray.privacy.sampler import PoissonSampler

DELTA = 1e-5
STEPS = 4
DRAW = GaussianNoise.draw


def mechanism(epsilon: float, q: float = 0.5, steps: int = STEPS) -> Mechanism:
    return Mechanism(
        noise_multiplier=solve_noise_multiplier(epsilon, DELTA, q, steps),
        sample_rate=q,
        max_grad_norm=0.1,
        num_steps=steps,
        num_patients=50,
        delta=DELTA,
    )


def lower_bound(used: Mechanism, num_canaries: int = 1000) -> float:
    scores = run_canaries(used, used.num_steps, num_canaries)
    return audit_bounds(scores.likelihoods, scores.included, DELTA, DELTA / 10, 0.95)[0].epsilon


def is_refuted(used: Mechanism, num_canaries: int = 2000) -> bool:
    """Audit a mechanism as a run's audit does, against the accountant's epsilon for it."""
    segment = [Segment(used.noise_multiplier, used.sample_rate, used.num_steps)]
    claims = [(delta, epsilon_spent(segment, delta)) for delta in (DELTA, DELTA / 10)]
    subject = AuditSubject(("north",), used, used.num_steps, (claims[0], claims[1]))
    found = audit_mechanism(subject, num_canaries, 0.95)
    assert found.could_exceed
    return found.is_exceeded


def test_p_value_against_every_outcome_of_randomized_response():
    epsilon, m, v = 0.7, 9, 7
    honest = math.exp(epsilon) / (1 + math.exp(epsilon))
    likely = sum(
        math.prod(honest if right else 1 - honest for right in outcome)
        for outcome in product((True, False), repeat=m)
        if sum(outcome) >= v
    )
    assert p_value(Guesses(m, m, v), epsilon, 0.0) == pytest.approx(likely, rel=1e-12)


def test_p_value_with_delta_by_hand():
    # One canary, one right guess: q + 2 m delta P[1 > W >= 0] / 1 with q = 3/4 at epsilon = ln 3.
    assert p_value(Guesses(1, 1, 1), math.log(3), 0.01) == pytest.approx(0.75 + 2 * 0.01 * 0.25, rel=1e-12)
    # Two of two guesses right among five canaries: the larger of P[W = 1] and P[W <= 1] / 2.
    slope = max(2 * 0.75 * 0.25, (2 * 0.75 * 0.25 + 0.25**2) / 2)
    assert p_value(Guesses(5, 2, 2), math.log(3), 0.01) == pytest.approx(0.75**2 + 2 * 5 * 0.01 * slope, rel=1e-12)


@pytest.mark.parametrize(("m", "r", "v"), [(1000, 100, 99), (500, 500, 400), (40, 20, 20), (10, 10, 0)])
def test_p_value_is_that_of_the_published_loop(m, r, v):
    epsilon, delta = 1.3, 1e-3
    success = 1 / (1 + math.exp(-epsilon))
    slope = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, success)
        slope = max(slope, total / i)
    expected = min(1.0, stats.binom.sf(v - 1, r, success) + 2 * m * delta * slope)
    assert p_value(Guesses(m, r, v), epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("m", [10, 1000])
def test_the_bound_of_flawless_guesses_in_closed_form(m):
    success = 0.05 ** (1 / m)
    bound = epsilon_lower_bound(Guesses(m, m, m), 0.0, 0.95)
    assert bound == pytest.approx(math.log(success / (1 - success)), abs=2e-4)


def test_no_better_than_coins_proves_nothing_and_delta_costs():
    assert epsilon_lower_bound(Guesses(1000, 1000, 505), DELTA, 0.95) == 0.0
    few, many = (epsilon_lower_bound(Guesses(1000, 100, 95), delta, 0.95) for delta in (1e-3, 1e-9))
    assert few < many


def test_the_surest_are_guessed_by_their_sign():
    scores = np.array([0.1, -5.0, 3.0, -0.2, 4.0])
    included = np.array([True, False, True, True, False])
    assert guess(scores, included, 3) == Guesses(5, 3, 2)
    assert guess(scores, included, 5) == Guesses(5, 5, 3)
    with pytest.raises(PrivacyConfigError, match="6 guesses were asked for 5 canaries"):
        guess(scores, included, 6)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(PrivacyConfigError, match="between 0 and 1"):
        epsilon_lower_bound(Guesses(10, 10, 10), DELTA, confidence)


@pytest.mark.ci
def test_bound_is_below_the_claim_on_20_honest_runs():
    used = mechanism(1.0)
    bounds = [lower_bound(used, 5000) for _ in range(20)]
    assert max(bounds) <= 1.0
    assert max(bounds) > 0.1  # or the audit would see nothing at all


def test_an_honest_mechanism_is_not_refuted():
    assert not is_refuted(mechanism(2.0, q=1.0))


def test_bound_is_not_empty_on_an_honest_run():
    used = mechanism(2.0, q=1.0, steps=1)
    assert 0.5 < lower_bound(used, 5000) <= 2.0


def test_bound_exceeds_the_claim_without_noise(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, size, std: np.zeros(size))
    assert lower_bound(mechanism(1.0, q=1.0)) > 1.0
    assert is_refuted(mechanism(4.0, q=1.0))


def test_bound_exceeds_a_large_claim_without_noise_in_sampled_steps(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, size, std: np.zeros(size))
    assert is_refuted(mechanism(4.0, q=0.5, steps=20))


def test_bound_exceeds_the_claim_with_a_quarter_of_the_noise(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, size, std: DRAW(self, size, std / 4))
    assert lower_bound(mechanism(1.0, q=1.0), 3000) > 1.0


def test_bound_exceeds_the_claim_when_everybody_is_drawn(monkeypatch):
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, num_patients: np.arange(num_patients))
    assert lower_bound(mechanism(0.5, q=0.05, steps=20), 4000) > 0.5


def test_bound_exceeds_the_claim_without_clipping(monkeypatch):
    def add(self, gradient):
        (whole,) = gradient
        self._total().add_(whole)

    monkeypatch.setattr(PatientGradientSum, "add", add)
    assert lower_bound(mechanism(1.0, q=1.0)) > 1.0


def test_scores_are_those_of_the_subsampled_gaussian():
    used = mechanism(8.0, q=0.5, steps=6)
    scores = run_canaries(used, 6, 4000)
    sigma = used.noise_multiplier
    out, inside = scores.sums[~scores.included], scores.sums[scores.included]
    assert abs(scores.included.mean() - 0.5) < 0.04
    assert out.mean() == pytest.approx(0.0, abs=5 * sigma * math.sqrt(6 / len(out)))
    assert out.std() == pytest.approx(sigma * math.sqrt(6), rel=0.08)
    assert inside.mean() == pytest.approx(3.0, abs=5 * math.sqrt(6 * (sigma**2 + 0.25) / len(inside)))


@pytest.mark.parametrize("q", [0.3, 1.0])
def test_likelihood_ratio_against_densities(q):
    x = np.array([-1.0, 0.3, 2.5])
    without, with_it = stats.norm.pdf(x, 0, 0.8), stats.norm.pdf(x, 1, 0.8)
    np.testing.assert_allclose(log_likelihood_ratio(x, q, 0.8), np.log(((1 - q) * without + q * with_it) / without))


def test_an_audit_needs_canaries_and_steps():
    with pytest.raises(PrivacyConfigError, match="give 1 step and 100 canaries at least"):
        run_canaries(mechanism(1.0), 0, 1000)
    with pytest.raises(PrivacyConfigError, match="with 99 canaries says nothing"):
        run_canaries(mechanism(1.0), 1, 99)


def test_gaussian_canaries_find_the_epsilon_of_a_gaussian():
    used = mechanism(1.0).model_copy(update={"noise_multiplier": 1.0, "sample_rate": 1.0})
    scores = run_canaries(used, 1, 100_000)
    estimate = gaussian_canary_epsilon(scores.sums[scores.included], scores.sums[~scores.included], DELTA)
    assert estimate == pytest.approx(epsilon_spent([Segment(1.0, 1.0, 1)], DELTA), abs=0.4)  # 4.377
    assert epsilon_spent([Segment(1.0, 1.0, 1)], DELTA) == pytest.approx(4.377, abs=1e-3)


def test_gaussian_estimate_is_the_divergence_of_the_fitted_gaussians():
    quantiles = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    present, absent = 1.5 + 1.2 * quantiles, quantiles
    epsilon = gaussian_canary_epsilon(present, absent, 1e-3)
    fitted = [(x.mean(), x.std(ddof=1)) for x in (present, absent)]

    def divergence(one, other):
        def gap(x):
            return max(0.0, stats.norm.pdf(x, *one) - math.exp(epsilon) * stats.norm.pdf(x, *other))

        return integrate.quad(gap, -12, 14, limit=500, points=[0, 2, 4, 6])[0]

    assert max(divergence(*fitted), divergence(*fitted[::-1])) == pytest.approx(1e-3, rel=1e-3)


def test_gaussian_estimate_of_equal_and_of_noiseless_groups():
    values = np.random.default_rng(0).normal(size=1000)
    assert gaussian_canary_epsilon(values, values, DELTA) == 0.0
    assert gaussian_canary_epsilon(np.ones(10), np.zeros(10), DELTA) == math.inf
    with pytest.raises(PrivacyConfigError, match="at least 2 canaries"):
        gaussian_canary_epsilon(values, values[:1], DELTA)
