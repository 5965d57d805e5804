"""What is decided before any hospital trains: whose delta, whose budget."""

import pytest
from small_runs import small_run

from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.planning import (
    account_delta,
    aggregation_weight,
    delta_of,
    is_for_one_run,
    mechanism_for,
    mechanism_in_round,
    sample_rate,
    steps_in_round,
    steps_of_run,
    steps_per_round,
)
from medfl_ray.federation.studies.baselines import check_baselines
from medfl_ray.privacy.accountant import Segment, epsilon_spent


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
    assert mechanism.num_records == num_patients


def test_the_rate_of_the_configuration_wins():
    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 2.0, "sample_rate": 0.3})
    site = SitePolicy(hospital="a", data_set="d", num_patients=40, max_epsilon=8.0)
    assert mechanism_for(run, site).sample_rate == 0.3


LIMITS = [
    ({"allowed_tasks": ("classification",)}, "allows classification; this run's data.task is 'segmentation'"),
    ({"max_steps_per_round": 1}, "allows 1 steps in a round; this run would take 2"),
    ({"max_grad_norm": 0.5}, "clip norm of at most 0.5; this run's is 1"),
    ({"min_noise_multiplier": 3.0}, "requires noise_multiplier >= 3; this run would use 2"),
]


@pytest.mark.parametrize(("limit", "reason"), LIMITS)
def test_what_a_site_does_not_allow_is_refused_when_the_run_is_planned(limit, reason):
    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 2.0})
    site = SitePolicy(hospital="a", data_set="d", num_patients=40, max_epsilon=8.0)
    assert mechanism_for(run, site) is not None
    with pytest.raises(PrivacyConfigError, match=reason):
        mechanism_for(run, site.model_copy(update=limit))


@pytest.mark.parametrize(("limit", "reason"), LIMITS[:2])
def test_task_and_steps_are_limited_without_differential_privacy_too(limit, reason):
    site = SitePolicy(hospital="a", data_set="d", num_patients=40)
    assert mechanism_for(small_run(), site) is None
    with pytest.raises(PrivacyConfigError, match=reason):
        mechanism_for(small_run(), site.model_copy(update=limit))


@pytest.mark.parametrize(("limit", "reason"), [({"max_steps_per_round": 3}, "would take 4"), LIMITS[0]])
def test_the_central_baseline_keeps_the_strictest_limits(limit, reason):
    run = small_run(federation={"baselines": ["central"]})
    sites = [SitePolicy(hospital=name, data_set="d", declared="public", num_patients=40) for name in ("a", "b")]
    assert check_baselines(run, sites) is None
    with pytest.raises(PrivacyConfigError, match=reason):
        check_baselines(run, [sites[0].model_copy(update=limit), sites[1]])


@pytest.mark.parametrize(("weighting", "weights"), [("patients", [40, 40]), ("cases", [55, 40]), ("uniform", [1, 1])])
def test_weight_is_what_a_hospital_declares_in_public(weighting, weights):
    run = small_run(aggregation={"weighting": weighting})
    counted = SitePolicy(hospital="a", data_set="d", num_patients=40, num_cases=55)
    uncounted = SitePolicy(hospital="b", data_set="d", num_patients=40)
    assert [aggregation_weight(run, policy) for policy in (counted, uncounted)] == weights


def test_steps_fall_with_the_square_root_of_the_round():
    run = small_run(federation={"local_steps": 10, "rounds": 5, "local_steps_schedule": "decay"})
    # 10 / 1, 1.41, 1.73, 2, 2.24, rounded up
    assert [steps_in_round(run, 10, number) for number in range(1, 6)] == [10, 8, 6, 5, 5]
    assert steps_of_run(run, 10) == 34
    assert steps_in_round(run, 1, 1000) == 1
    assert steps_of_run(small_run(federation={"rounds": 5}), 10) == 50


def test_the_noise_is_that_of_the_steps_which_are_taken():
    sections = {"privacy": {"enable_dp": True, "epsilon": 4.0, "sample_rate": 0.2}}
    site = SitePolicy(hospital="a", data_set="d", num_patients=40, max_epsilon=8.0)
    federation = {"local_steps": 10, "rounds": 5}
    run = small_run(federation={**federation, "local_steps_schedule": "decay"}, **sections)
    first = mechanism_for(run, site)
    assert first.noise_multiplier < mechanism_for(small_run(federation=federation, **sections), site).noise_multiplier
    each = [mechanism_in_round(run, first, number) for number in range(1, 6)]
    assert [mechanism.num_steps for mechanism in each] == [10, 8, 6, 5, 5]
    segments = [Segment(m.noise_multiplier, m.sample_rate, m.num_steps) for m in each]
    assert 3.9 <= epsilon_spent(segments, first.delta) <= 4.0


@pytest.mark.parametrize(("federation", "steps"), [({"local_epochs": 4}, [7, 40]), ({"local_steps": 9}, [7, 7])])
def test_a_large_hospital_takes_no_more_steps_than_allowed(federation, steps):
    run = small_run(federation={"local_steps": None, **federation, "max_local_steps": 7})
    free = small_run(federation={"local_steps": None, "local_epochs": 4})
    site = SitePolicy(hospital="a", data_set="d", num_patients=20)
    assert steps_per_round(run, site) == steps[0]
    assert steps_per_round(free if "local_epochs" in federation else run, site) == steps[1]
