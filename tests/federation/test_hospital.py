"""A hospital trains what its ledger was charged for and tells no more than it may, whatever the plan says."""

import pytest
from small_runs import small_run

from actors.hospital import HospitalSpec, build_hospital
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import ClientFailure, ClientUpdate, RoundPlan

PRIVACY = {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": 0.5}


@pytest.fixture
def hospital(tmp_path):
    run = small_run(privacy=PRIVACY)
    policy = list_hospitals(run)[0]
    return build_hospital(HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path))


def plan_for(hospital, num_steps=None, **changes):
    run, policy = hospital._parts.run, hospital._parts.policy
    mechanism = mechanism_for(run, policy).model_copy(update=changes)
    return RoundPlan(
        job="job",
        round=1,
        attempt=1,
        config_hash="",
        weights_checksum="",
        hospitals=(hospital.id,),
        num_steps={hospital.id: num_steps or mechanism.num_steps},
        learning_rate=0.01,
        mechanisms={hospital.id: mechanism},
    )


def weights_of(hospital):
    return hospital._parts.trainer.initial_weights(0)


def test_a_plan_that_trains_more_steps_than_it_charges_is_refused(hospital):
    plan = plan_for(hospital, num_steps=50)
    answer = hospital.reserve(plan)
    assert isinstance(answer, ClientFailure)
    assert "50 steps" in answer.reason
    assert hospital.export_ledger()["events"] == []


@pytest.mark.parametrize("changes", [{"noise_multiplier": 0.1}, {"sample_rate": 1.0}, {"max_grad_norm": 9.0}])
def test_only_the_reserved_mechanism_is_trained(hospital, changes):
    assert not isinstance(hospital.reserve(plan_for(hospital)), ClientFailure)
    answer = hospital.train(plan_for(hospital, **changes), weights_of(hospital))
    assert isinstance(answer, ClientFailure)
    assert "not the one that was reserved" in answer.reason
    assert hospital.info().spent.epsilon > 0


def test_a_reservation_serves_one_training(hospital):
    plan = plan_for(hospital)
    hospital.reserve(plan)
    assert isinstance(hospital.train(plan, weights_of(hospital)), ClientUpdate)
    again = hospital.train(plan, weights_of(hospital))
    assert isinstance(again, ClientFailure)
    assert "no reservation" in again.reason
