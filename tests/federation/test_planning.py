"""What is decided before any hospital trains: whose delta, whose budget."""

import pytest
from small_runs import small_run

from medfl_ray.federation.planning import (
    account_delta,
    delta_of,
    is_for_one_run,
    mechanism_for,
    sample_rate,
)
from medfl_ray.site_policy import SitePolicy


def test_a_run_cannot_stretch_a_declared_budget_by_a_larger_delta():
    run = small_run(privacy={"enable_dp": True, "epsilon": 8.0, "delta": 1e-3})
    site = SitePolicy(hospital="a", data_set="d", num_patients=40, max_epsilon=8.0)
    assert delta_of(run, site) == 1e-3
    assert account_delta(run, site) == site.effective_delta == 1e-5
    own = site.model_copy(update={"delta": 1e-6})
    assert account_delta(run, own) == delta_of(run, own) == 1e-6


def test_private_data_without_a_declared_budget_are_for_one_run():
    site = SitePolicy(hospital="a", data_set="d", num_patients=40)
    assert is_for_one_run(site)
    assert not is_for_one_run(site.model_copy(update={"max_epsilon": 8.0}))
    assert not is_for_one_run(site.model_copy(update={"declared": "public"}))


@pytest.mark.parametrize(("num_patients", "rate"), [(40, 0.1), (7, 4 / 7), (3, 1.0)])
def test_the_rate_is_the_batch_over_the_public_number_of_patients(num_patients, rate):
    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 2.0}, training={"batch_size": 4})
    site = SitePolicy(hospital="a", data_set="d", num_patients=num_patients, max_epsilon=8.0)
    mechanism = mechanism_for(run, site)
    assert sample_rate(run, site) == mechanism.sample_rate == pytest.approx(rate)
    assert mechanism.num_patients == num_patients


def test_the_rate_of_the_configuration_wins():
    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 2.0, "sample_rate": 0.3})
    site = SitePolicy(hospital="a", data_set="d", num_patients=40, max_epsilon=8.0)
    assert mechanism_for(run, site).sample_rate == 0.3
