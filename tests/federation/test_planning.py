"""What is decided before any hospital trains: whose delta, whose budget."""

from small_runs import small_run

from medfl_ray.federation.planning import account_delta, delta_of, is_for_one_run
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
