"""Drift: zero for the training's intensities, one for a shift of one deviation."""

import numpy as np
import pytest
from tiny_models import FINGERPRINT, noise_volume

from medfl_ray.data.volume import Volume
from serve.replicas.drift import MIN_VOLUMES, DriftState, shift_of


def test_the_trainings_own_intensities_have_no_shift():
    (shift,) = shift_of(noise_volume((40, 40, 40)), FINGERPRINT)
    assert shift < 0.03


def test_a_shift_of_the_mean_is_found_in_deviations():
    (shift,) = shift_of(noise_volume((40, 40, 40), shift=1.0), FINGERPRINT)
    assert shift == pytest.approx(1.0, abs=0.03)


def test_other_units_are_found():
    volume = noise_volume((40, 40, 40))
    (shift,) = shift_of(Volume(volume.array * 10, np.eye(4)), FINGERPRINT)
    # Five percentiles, each nine times its own size away: 9 * (2.326 + 0.674 + 0 + 0.674 + 2.326) / 5.
    assert shift == pytest.approx(9 * 6.0 / 5, rel=0.03)


def test_the_mean_shift_begins_as_an_average_and_goes_on_smoothed():
    state = DriftState()
    for value in (1.0, 3.0):
        state = state.after((value,), smoothing=0.1)
    assert state.shifts == pytest.approx((2.0,))
    for _ in range(20):
        state = state.after((2.0,), smoothing=0.1)
    state = state.after((12.0,), smoothing=0.1)
    assert state.shifts == pytest.approx((3.0,))


def test_the_alert_waits_for_enough_volumes_and_goes_away():
    state = DriftState()
    for number in range(1, MIN_VOLUMES + 1):
        state = state.after((1.0, 0.0), smoothing=0.5)
        assert state.is_alert(0.5) == (number == MIN_VOLUMES)
    for _ in range(5):
        state = state.after((0.0, 0.0), smoothing=0.5)
    assert not state.is_alert(0.5)
