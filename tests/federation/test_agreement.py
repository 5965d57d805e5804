"""What a hospital refuses although a coordinator asks for it: other jobs, rounds, steps, rates and budgets."""

import pytest
from small_runs import small_run

from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.hospital_rules.agreement import Agreement
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import RoundPlan

PRIVATE = SitePolicy(hospital="a", data_set="scans", num_patients=20, max_epsilon=8)
NOISE = {"enable_dp": True, "noise_multiplier": 1.4, "sample_rate": 0.25}


def run_with(**sections):
    return small_run(**{"privacy": NOISE, **sections})


def plan_of(run, job="job", number=1, policy=PRIVATE, steps=2, **mechanism):
    planned = mechanism_for(run, policy)
    changed = {} if planned is None else {policy.hospital: planned.model_copy(update={"num_steps": steps, **mechanism})}
    return RoundPlan(
        job=job,
        round=number,
        attempt=1,
        config_hash="",
        weights_checksum="",
        hospitals=(policy.hospital,),
        num_steps={policy.hospital: steps},
        learning_rate=0.01,
        mechanisms=changed,
    )


def test_hole_a_renamed_job_is_another_agreement():
    run = run_with()
    agreed = Agreement(run, PRIVATE)
    agreed.check_plan(plan_of(run, "job"))
    agreed.check_plan(plan_of(run, "job", 2))
    with pytest.raises(PrivacyConfigError, match="not of the run"):
        agreed.check_plan(plan_of(run, "job1"))


def test_hole_the_job_of_the_specification_binds_from_the_first_request_on():
    run = run_with()
    with pytest.raises(PrivacyConfigError, match="not of the run"):
        Agreement(run, PRIVATE, "agreed").check_plan(plan_of(run, "other"))


def test_a_refused_plan_does_not_bind():
    run = run_with()
    agreed = Agreement(run, PRIVATE)
    with pytest.raises(PrivacyConfigError):
        agreed.check_plan(plan_of(run, "first", number=99))
    agreed.check_plan(plan_of(run, "second"))
    assert agreed.job == "second"


@pytest.mark.parametrize("number", [0, -1, 3, 900])
def test_hole_rounds_beyond_those_of_the_run_are_refused(number):
    run = run_with()
    with pytest.raises(PrivacyConfigError, match="outside the 2 rounds"):
        Agreement(run, PRIVATE).check_plan(plan_of(run, number=number))


@pytest.mark.parametrize("kind", ["local", "central", "coalition-2-of-2-rounds-0123456789ab", "anything", "local/x"])
def test_hole_what_the_run_does_not_plan_is_not_trained(kind):
    run = run_with()
    with pytest.raises(PrivacyConfigError, match="does not plan"):
        Agreement(run, PRIVATE).check_plan(plan_of(run, f"job/{kind}"))


def test_planned_baselines_and_studies_are_agreed_to():
    public = PRIVATE.model_copy(update={"declared": "public"})
    run = run_with(federation={"baselines": ["local"]}, evaluation={"leave_one_out": True, "study_rounds": 1})
    agreed = Agreement(run, public)
    agreed.check_plan(plan_of(run, "job/local", 2, public))
    agreed.check_plan(plan_of(run, "job/coalition-2-of-1-rounds-0123456789ab", 1, public))
    with pytest.raises(PrivacyConfigError, match="outside the 1 rounds"):
        agreed.check_plan(plan_of(run, "job/coalition-2-of-1-rounds-0123456789ab", 2, public))


def test_the_central_baseline_takes_the_steps_of_all_and_trains_nothing_else():
    run = run_with(federation={"baselines": ["central"]})
    pooled = PRIVATE.model_copy(update={"hospital": "central", "num_patients": 40})
    agreed = Agreement(run, pooled, "job", [PRIVATE, PRIVATE.model_copy(update={"hospital": "b"})])
    agreed.check_plan(plan_of(run, "job/central", 1, pooled, steps=4))
    with pytest.raises(PrivacyConfigError, match="5 steps"):
        agreed.check_plan(plan_of(run, "job/central", 1, pooled, steps=5))
    with pytest.raises(PrivacyConfigError, match="does not plan"):
        agreed.check_plan(plan_of(run, "job", 1, pooled))


def test_hole_more_steps_than_planned_are_refused():
    run = run_with()
    with pytest.raises(PrivacyConfigError, match="for 3 steps; the run plans 2"):
        Agreement(run, PRIVATE).check_plan(plan_of(run, steps=3))


@pytest.mark.parametrize(
    ("changes", "reason"), [({"sample_rate": 0.5}, "rate 0.5"), ({"noise_multiplier": 1.0}, "noise_multiplier 1")]
)
def test_hole_a_larger_rate_or_less_noise_than_the_run_says_is_refused(changes, reason):
    run = run_with()
    with pytest.raises(PrivacyConfigError, match=reason):
        Agreement(run, PRIVATE).check_mechanism(plan_of(run, **changes))


def test_hole_a_delta_above_one_patient_in_all_is_refused_by_the_hospital():
    run = run_with()
    plan = plan_of(run, delta=0.05)
    with pytest.raises(PrivacyConfigError, match="not below 1 / num_patients"):
        Agreement(small_run(privacy={**NOISE, "delta": 0.05}), PRIVATE).check_mechanism(plan)


def test_hole_private_data_without_any_budget_are_refused_by_the_hospital():
    run = run_with()
    unlimited = PRIVATE.model_copy(update={"max_epsilon": None})
    with pytest.raises(PrivacyConfigError, match="no budget"):
        Agreement(run, unlimited).check_mechanism(plan_of(run))


@pytest.mark.parametrize(
    ("changes", "has_charges", "reason"),
    [
        ({}, False, "a budget"),
        ({"max_epsilon": None}, True, "charges in its ledger"),
        ({"max_epsilon": None, "require_dp": True}, False, "only with differential privacy"),
        ({"declared": "public", "require_dp": True}, False, "only with differential privacy"),
    ],
)
def test_hole_a_budget_or_a_charge_binds_runs_without_differential_privacy(changes, has_charges, reason):
    with pytest.raises(PrivacyConfigError, match=reason):
        Agreement(small_run(), PRIVATE.model_copy(update=changes)).check_unprotected(has_charges)


@pytest.mark.parametrize(
    ("changes", "has_charges"),
    [({"max_epsilon": None}, False), ({"allow_unprotected": True}, True), ({"declared": "public"}, True)],
)
def test_where_nothing_forbids_it_data_train_without_protection(changes, has_charges):
    Agreement(small_run(), PRIVATE.model_copy(update=changes)).check_unprotected(has_charges)


def test_the_runs_epsilon_bounds_its_rounds_and_the_extra_one_all_beside_them():
    run = small_run(privacy={"enable_dp": True, "epsilon": 2.0})
    assert Agreement(run, PRIVATE).budget_of("job") == 2.0
    assert Agreement(run, PRIVATE).budget_of("job/local") == 0.0
    public = PRIVATE.model_copy(update={"declared": "public"})
    assert Agreement(run, public).budget_of("job/local") is None
    more = small_run(privacy={"enable_dp": True, "epsilon": 2.0, "extra_epsilon": 3.0})
    assert Agreement(more, PRIVATE).budget_of("job/central") == 3.0
