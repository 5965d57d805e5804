"""Gaussian noise: its distribution, its independence, its secrecy."""

import inspect
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from scipy import stats

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy import noise as noise_module
from medfl_ray.privacy.noise import GaussianNoise

SIZE = 100_000


def test_chi_square_on_a_hundred_thousand_coordinates() -> None:
    values = GaussianNoise().draw(SIZE, 3.0)
    edges = stats.norm.ppf(np.linspace(0, 1, 101), scale=3.0)
    counts, _ = np.histogram(values, bins=edges)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_moments_and_tails() -> None:
    values = GaussianNoise().draw(1_000_000, 2.0)
    assert values.mean() == pytest.approx(0.0, abs=6 * 2.0 / 1000)
    assert values.std() == pytest.approx(2.0, rel=0.005)
    assert stats.kurtosis(values) == pytest.approx(0.0, abs=0.03)
    beyond_three = np.mean(np.abs(values) > 6.0)
    assert beyond_three == pytest.approx(2 * stats.norm.sf(3), rel=0.1)


def test_neighbours_and_the_two_halves_of_a_pair_are_independent() -> None:
    half = noise_module.HALF_BLOCK
    values = GaussianNoise().draw(20 * 2 * half, 1.0).reshape(20, 2, half)
    pairs = [
        (values[:, 0].ravel(), values[:, 1].ravel()),
        (values[..., :-1].ravel(), values[..., 1:].ravel()),
        (values[:-1].ravel(), values[1:].ravel()),
    ]
    for first, second in pairs:
        limit = 5 / np.sqrt(len(first))
        assert abs(np.corrcoef(first, second)[0, 1]) < limit
        assert abs(np.corrcoef(first**2, second**2)[0, 1]) < limit


def test_each_value_is_a_sum_of_four_draws() -> None:
    # One draw from 53 bits cannot pass 8.6 standard deviations; the four are independent of each other.
    radius, cosine, sine = GaussianNoise()._polar()
    assert radius.shape == cosine.shape == (4, noise_module.HALF_BLOCK)
    draws = radius * cosine
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-5
    assert np.abs(np.corrcoef(draws)[np.triu_indices(4, 1)]).max() < 6 / np.sqrt(noise_module.HALF_BLOCK)
    angles = np.arctan2(sine * radius, cosine * radius).ravel()
    assert stats.kstest((angles / np.pi + 1) / 2, "uniform").pvalue > 1e-5


def test_the_sine_is_right_to_the_last_bit() -> None:
    angles = np.linspace(-np.pi / 4, np.pi / 4, 10_001)
    found = noise_module._sine(angles, np.empty_like(angles), np.empty_like(angles))
    assert np.abs(found - np.sin(angles)).max() < 3e-16


def test_values_are_float64_with_full_precision() -> None:
    values = GaussianNoise().draw(1000, 1.0)
    assert values.dtype == np.float64
    assert len(np.unique(values.astype(np.float32) - values)) > 900


@pytest.mark.parametrize("size", [0, 1, 2, 8191, 8192, 8193])
def test_any_size(size: int) -> None:
    assert GaussianNoise().draw(size, 1.0).shape == (size,)


def test_no_seed_reaches_the_noise() -> None:
    assert not inspect.signature(GaussianNoise).parameters
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # the very seed that must not matter
        drawn.append(GaussianNoise().draw(64, 1.0))
    assert not np.isin(drawn[0], drawn[1]).any()


def test_a_stream_does_not_repeat_itself() -> None:
    noise = GaussianNoise()
    assert len(np.unique(np.concatenate([noise.draw(5000, 1.0), noise.draw(5000, 1.0)]))) == 10_000


def test_a_copy_in_another_process_draws_its_own() -> None:
    noise = GaussianNoise()
    noise.draw(1, 1.0)
    copy = pickle.loads(pickle.dumps(noise))
    assert not np.isin(noise.draw(64, 1.0), copy.draw(64, 1.0)).any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_repeat_its_parent() -> None:
    noise = GaussianNoise()
    noise.draw(1, 1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, noise.draw(64, 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reader, 64 * 8))
    os.close(reader)
    os.close(writer)
    assert len(theirs) == 64
    assert not np.isin(noise.draw(64, 1.0), theirs).any()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_no_noise_is_refused(std: float) -> None:
    with pytest.raises(PrivacyConfigError, match="standard deviation"):
        GaussianNoise().draw(3, std)


def test_each_draw_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a copy of the machine's memory would draw the same noise again."""
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(noise_module.os, "urandom", lambda count: asked.append(count) or real(count))
    stream = GaussianNoise()
    for _ in range(3):
        stream.draw(10, 1.0)
    assert asked == [32, 16] * 3
