"""Poisson sampling of patients."""

import inspect

import numpy as np
import pytest
from scipy import stats

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.sampler import PoissonSampler


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_every_patient_comes_at_the_rate_and_sizes_are_binomial(rate: float) -> None:
    sampler = PoissonSampler(rate)
    draws = [sampler.draw(40) for _ in range(5000)]
    hits = np.bincount(np.concatenate(draws), minlength=40)
    assert stats.chi2.sf(((hits - 5000 * rate) ** 2 / (5000 * rate * (1 - rate))).sum(), df=40) > 1e-6
    sizes = np.array([len(draw) for draw in draws])
    assert sizes.var() == pytest.approx(40 * rate * (1 - rate), rel=0.15)  # a fixed batch size would have no variance


def test_patients_are_independent_of_each_other() -> None:
    sampler = PoissonSampler(0.5)
    table = np.zeros((4000, 6))
    for row in table:
        row[sampler.draw(6)] = 1
    correlations = np.corrcoef(table.T)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_rate_one_takes_everyone_once() -> None:
    assert PoissonSampler(1.0).draw(7).tolist() == list(range(7))


def test_nobody_may_be_drawn_and_nobody_twice() -> None:
    sampler = PoissonSampler(0.05)
    draws = [sampler.draw(10) for _ in range(300)]
    assert any(len(draw) == 0 for draw in draws)
    assert all(len(set(draw.tolist())) == len(draw) for draw in draws)
    assert PoissonSampler(0.5).draw(0).tolist() == []


def test_no_seed_reaches_the_sampler() -> None:
    assert list(inspect.signature(PoissonSampler).parameters) == ["sample_rate"]
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # the very seed that must not matter
        drawn.append(PoissonSampler(0.5).draw(200).tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyConfigError, match="sample_rate"):
        PoissonSampler(rate)
