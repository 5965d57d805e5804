"""Bootstrap intervals over patients."""

from __future__ import annotations

import numpy as np
import pytest

from medfl_ray.training.scoring.evaluation import PatientScore
from medfl_ray.training.scoring.intervals import bootstrap_intervals, interval_of_means, intervals_of_means


@pytest.mark.ci
def test_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.1, 100)
    low, high = bootstrap_intervals([PatientScore(dice={"core": float(v)}) for v in values])["dice"]
    half = 1.96 * values.std() / 10
    assert bootstrap_intervals([PatientScore(dice={"core": float(v)}) for v in values])["dice"] == (low, high)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)


@pytest.mark.ci
def test_an_auc_has_an_interval() -> None:
    scores = [PatientScore(probabilities=(1 - p, p), truth=t) for p, t in [(0.9, 1), (0.7, 1), (0.8, 0), (0.1, 0)]]
    low, high = bootstrap_intervals(scores)["auc"]
    assert 0 <= low < high <= 1


def test_hospitals_count_alike_and_patients_are_drawn_within_each() -> None:
    assert interval_of_means([[0.4, 0.4, 0.4], [0.8]]) == pytest.approx((0.6, 0.6))
    low, high = interval_of_means([[0.0, 1.0] * 50, [0.5] * 3])
    half = 1.96 * 0.5 / 10 / 2  # the deviation of one mean of a hundred, halved by the hospital that never varies
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


def test_bootstrap_intervals_of_a_mean_cover_it_about_as_often_as_they_say():
    """300 samples of 40 patients with a known mean: a 95 % percentile interval covers it in 90 to 98 % of them."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        rows = [{"dice": value} for value in rng.beta(8, 2, 40)]
        low, high = intervals_of_means(rows)["dice"]
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_intervals_of_means_are_seeded_and_shrink_with_patients():
    rows = [{"dice": value, "hd95": 10 * value} for value in np.random.default_rng(1).random(50)]
    few, many = intervals_of_means(rows[:10]), intervals_of_means(rows)
    assert intervals_of_means(rows) == many
    assert intervals_of_means(rows, seed=1) != many
    assert few["dice"][1] - few["dice"][0] > many["dice"][1] - many["dice"][0]
    assert many["hd95"] == pytest.approx([10 * bound for bound in many["dice"]])
    assert intervals_of_means([]) == {}
