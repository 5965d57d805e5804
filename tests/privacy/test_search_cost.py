"""What a search costs: never less than any mix of its trials, and repeat-and-select as dp-accounting has it."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.accountant import RENYI_ORDERS, Segment, epsilon_spent, renyi_epsilon
from medfl_ray.privacy.search_cost import selected_epsilon, worst_case_epsilon

DELTA = 1e-5


def test_trials_of_one_kind_are_composed_by_pld():
    trial, spent = Segment(3.0, 0.1, 20), Segment(4.0, 0.2, 10)
    expected = epsilon_spent([spent, Segment(3.0, 0.1, 60)], DELTA)
    assert worst_case_epsilon([spent], [trial], 3, DELTA) == expected


def test_the_trial_with_least_noise_and_most_steps_is_the_worst_case():
    kinds = [Segment(3.0, 0.1, 20), Segment(2.0, 0.1, 40)]
    assert worst_case_epsilon([], kinds, 2, DELTA) == epsilon_spent([Segment(2.0, 0.1, 80)], DELTA)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_no_mix_of_trials_costs_more_than_the_worst_case(drawn):
    kinds = [Segment(4.0, 0.5, 8), Segment(5.6, 0.5, 16), Segment(7.9, 0.5, 32)]  # less noise, fewer steps
    bound = worst_case_epsilon([], kinds, 3, DELTA)
    assert epsilon_spent([kinds[place] for place in drawn], DELTA) <= bound
    assert bound < 1.25 * renyi_epsilon([kinds[0]] * 3, DELTA)  # and it is of use


def test_a_search_without_trials_has_no_worst_case():
    with pytest.raises(PrivacyConfigError, match="no worst case"):
        worst_case_epsilon([], [], 3, DELTA)


@pytest.mark.parametrize(("mean", "shape"), [(10.0, math.inf), (10.0, 1.0), (3.0, 0.5)])
def test_the_best_of_many_costs_more_than_one_trial_and_what_dp_accounting_says(mean, shape):
    trial = Segment(4.0, 0.25, 50)
    event = dp_event.RepeatAndSelectDpEvent(
        dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(0.25, dp_event.GaussianDpEvent(4.0)), 50),
        mean,
        shape,
    )
    expected = RdpAccountant(RENYI_ORDERS).compose(event).get_epsilon(DELTA)
    found = selected_epsilon(trial, DELTA, mean, shape)
    assert found == pytest.approx(expected)
    assert found > renyi_epsilon([trial], DELTA)


def test_the_best_of_many_costs_less_than_all_of_them():
    trial = Segment(4.0, 0.25, 50)
    assert selected_epsilon(trial, DELTA, 64.0, 1.0) < epsilon_spent([trial] * 64, DELTA)


@pytest.mark.parametrize(("mean", "shape"), [(0.5, 1.0), (10.0, 0.0), (math.nan, 1.0)])
def test_a_number_of_trials_that_cannot_be_drawn_is_refused(mean, shape):
    with pytest.raises(PrivacyConfigError, match="number of trials"):
        selected_epsilon(Segment(4.0, 0.25, 50), DELTA, mean, shape)
