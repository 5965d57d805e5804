"""Clip, sum, noise, divide: the sensitivity bound and the release."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.dpsgd import PatientGradientSum, gradient_norm
from medfl_ray.privacy.noise import GaussianNoise

P = 30


class NoNoise(GaussianNoise):
    """Shows the sum beneath the noise, to tests alone."""

    def draw(self, size: int, std: float) -> np.ndarray:
        return np.zeros(size)


def mechanism(**changes: float) -> Mechanism:
    values = {
        "noise_multiplier": 1.3,
        "sample_rate": 0.25,
        "max_grad_norm": 0.7,
        "num_steps": 1,
        "num_patients": 40,
        "delta": 1e-5,
    }
    return Mechanism(**{**values, **changes})  # type: ignore[arg-type]


def released_sum(gradients: list[list[torch.Tensor]], m: Mechanism, size: int = P) -> torch.Tensor:
    total = PatientGradientSum(size, m, NoNoise())
    for gradient in gradients:
        total.add(gradient)
    return total.release() * m.sample_rate * m.num_records


def patient(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, generator=generator) * scale, torch.randn(10, generator=generator) * scale]


def test_a_hand_computed_step() -> None:
    m = mechanism(max_grad_norm=1.0, sample_rate=0.5, num_patients=4)
    total = PatientGradientSum(2, m, NoNoise())
    total.add([torch.tensor([3.0, 4.0])])  # norm 5, clipped to (0.6, 0.8)
    total.add([torch.tensor([0.3]), torch.tensor([-0.4])])  # norm 0.5, kept
    assert torch.allclose(total.release(), torch.tensor([0.9, 0.4], dtype=torch.float64) / 2, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e30), others=st.integers(0, 4))
def test_adding_a_patient_moves_the_sum_by_at_most_the_clip_norm(seed: int, scale: float, others: int) -> None:
    m = mechanism()
    rest = [patient(i + 20_000) for i in range(others)]
    moved = released_sum([*rest, patient(seed, scale)], m) - released_sum(rest, m)
    assert float(moved.norm()) <= m.max_grad_norm * (1 + 1e-6)


def test_sensitivity_with_millions_of_parameters() -> None:
    size = 3_000_000
    gradient = [
        torch.full((size,), 1e-3, dtype=torch.float32),
    ]
    m = mechanism(max_grad_norm=1.0)
    assert float(released_sum([gradient], m, size).norm()) <= 1.0 + 1e-9
    assert gradient_norm(gradient) == pytest.approx(math.sqrt(size) * float(np.float32(1e-3)), rel=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_without_a_norm_counts_as_zero(bad: float) -> None:
    broken = patient(1)
    broken[0][0, 0] = bad
    alone = released_sum([patient(2)], mechanism())
    assert torch.equal(released_sum([patient(2), broken], mechanism()), alone)


def test_a_norm_beyond_float64_counts_as_zero() -> None:
    huge = [torch.full((P,), 1e300, dtype=torch.float64)]
    assert torch.equal(released_sum([huge], mechanism()), torch.zeros(P, dtype=torch.float64))


def test_a_zero_gradient_is_kept_zero() -> None:
    assert torch.equal(released_sum([[torch.zeros(P)]], mechanism()), torch.zeros(P, dtype=torch.float64))


def test_half_precision_gradients_are_clipped_in_float64() -> None:
    gradient = [torch.full((P,), 300.0, dtype=torch.float16)]  # its square overflows float16
    assert float(released_sum([gradient], mechanism()).norm()) == pytest.approx(0.7, rel=1e-9)


def test_the_callers_tensors_are_not_changed() -> None:
    gradient = patient(3, 100.0)
    before = [tensor.clone() for tensor in gradient]
    total = PatientGradientSum(P, mechanism())
    total.add(gradient)
    total.release()
    assert all(torch.equal(a, b) for a, b in zip(gradient, before, strict=True))


def test_gradients_that_still_hang_on_a_graph_are_taken() -> None:
    weight = torch.randn(P, requires_grad=True)
    total = PatientGradientSum(P, mechanism())
    total.add([weight * 2])
    assert not total.release().requires_grad


def test_an_empty_step_is_noised_with_the_right_deviation() -> None:
    size = 100_000
    m = mechanism()
    released = PatientGradientSum(size, m).release()
    expected = m.noise_multiplier * m.max_grad_norm / (m.sample_rate * m.num_records)
    assert float(released.std()) == pytest.approx(expected, rel=0.01)
    assert float(released.mean()) == pytest.approx(0.0, abs=6 * expected / math.sqrt(size))


def test_noise_of_a_full_step_has_the_same_deviation() -> None:
    size = 100_000
    m = mechanism()
    gradient = [torch.ones(size)]
    noised = PatientGradientSum(size, m)
    for _ in range(10):
        noised.add(gradient)
    residual = noised.release() * m.sample_rate * m.num_records - released_sum([gradient] * 10, m, size)
    assert float(residual.std()) == pytest.approx(m.noise_multiplier * m.max_grad_norm, rel=0.01)


def test_a_second_release_holds_nothing_of_the_first_step() -> None:
    total = PatientGradientSum(P, mechanism(), NoNoise())
    total.add(patient(4))
    assert float(total.release().norm()) > 0
    assert float(total.release().norm()) == 0


def test_the_divisor_is_public_whatever_the_batch() -> None:
    m = mechanism()
    one = released_sum([patient(5)], m)
    three = released_sum([patient(5)] * 3, m)
    assert torch.allclose(three, 3 * one)


def test_a_gradient_of_another_network_is_refused() -> None:
    with pytest.raises(PrivacyConfigError, match="29 elements"):
        PatientGradientSum(P, mechanism()).add([torch.zeros(29)])
    with pytest.raises(PrivacyConfigError, match="at least one"):
        PatientGradientSum(0, mechanism())
