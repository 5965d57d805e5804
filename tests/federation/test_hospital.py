"""A hospital trains what its ledger was charged for and tells no more than it may, whatever the plan says."""

import dataclasses

import pytest
from small_runs import small_run

from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import LabelError, UnreadableFile
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.hospital_rules.agreement import Agreement
from medfl_ray.federation.hospital_rules.labels import labelled
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


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"allowed_tasks": ()}, "allows nothing"),
        ({"max_steps_per_round": 1}, "1 steps in a round"),
        ({"max_total_steps": 1}, "1 private steps"),
        ({"max_grad_norm": 0.5}, "clip norm of at most 0.5"),
        ({"min_noise_multiplier": 3.0}, "noise_multiplier >= 3"),
    ],
)
def test_the_hospitals_own_policy_wins_over_any_plan(tmp_path, limit, reason):
    run = small_run(privacy=PRIVACY)
    policy = list_hospitals(run)[0]
    planned_for = build_hospital(HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path / "planned"))
    strict = policy.model_copy(update=limit)
    hospital = build_hospital(HospitalSpec(run, strict, 0, (policy.hospital,), tmp_path / "strict"))
    answer = hospital.reserve(plan_for(planned_for))
    assert isinstance(answer, ClientFailure)
    assert reason in answer.reason
    assert hospital.export_ledger()["events"] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"noise_multiplier": 0.1}, "noise_multiplier 0.1"),
        ({"noise_multiplier": 900.0}, "not the one that was reserved"),
        ({"sample_rate": 1.0}, "at rate 1"),
        ({"sample_rate": 0.1}, "not the one that was reserved"),
        ({"max_grad_norm": 9.0}, "clips patients of 'university' at 9"),
    ],
)
def test_only_the_reserved_mechanism_is_trained(hospital, changes, reason):
    assert not isinstance(hospital.reserve(plan_for(hospital)), ClientFailure)
    answer = hospital.train(plan_for(hospital, **changes), weights_of(hospital))
    assert isinstance(answer, ClientFailure)
    assert reason in answer.reason
    assert hospital.info().spent.epsilon > 0


def test_a_reservation_serves_one_training(hospital):
    plan = plan_for(hospital)
    hospital.reserve(plan)
    assert isinstance(hospital.train(plan, weights_of(hospital)), ClientUpdate)
    again = hospital.train(plan, weights_of(hospital))
    assert isinstance(again, ClientFailure)
    assert "no reservation" in again.reason


class BrokenData:
    """Data of which every case is broken; the message is what a loader of private data writes."""

    num_train_patients = 6

    def train_patches(self, patient_index, num_patches, rng):
        raise UnreadableFile("hospital 'university', case 5 of 43: the file ends early")


@pytest.mark.parametrize("declared", ["private", "public"])
def test_a_broken_case_of_private_data_is_not_named_outside(hospital, declared, capsys):
    policy = hospital._parts.policy.model_copy(update={"declared": declared, "max_epsilon": 100.0})
    run = small_run(privacy=PRIVACY, federation={"local_steps": 20})
    parts = dataclasses.replace(
        hospital._parts, data=BrokenData(), run=run, policy=policy, agreement=Agreement(run, policy)
    )
    changed = Hospital(parts)
    plan = plan_for(hospital, num_steps=20)
    plan = plan.model_copy(
        update={"mechanisms": {hospital.id: plan.mechanisms[hospital.id].model_copy(update={"num_steps": 20})}}
    )
    changed.reserve(plan)
    answer = changed.train(plan, weights_of(hospital))
    assert isinstance(answer, ClientFailure)
    assert ("case 5 of 43" in answer.reason) == (declared == "public")
    if declared == "private":
        assert "UnreadableFile" not in answer.reason
        assert not any(character.isdigit() for character in answer.reason)
        assert "case 5 of 43" in capsys.readouterr().out


@pytest.mark.parametrize("declared", ["private", "public"])
def test_how_long_a_private_hospital_trained_stays_there(hospital, declared):
    policy = hospital._parts.policy.model_copy(update={"declared": declared})
    changed = Hospital(dataclasses.replace(hospital._parts, policy=policy))
    plan = plan_for(hospital)
    changed.reserve(plan)
    duration = changed.train(plan, weights_of(hospital)).duration
    assert duration.label == ("suppressed" if declared == "private" else "public")
    assert (duration.value is None) == (declared == "private")


def test_a_suppressed_figure_does_not_tell_by_its_absence_that_nobody_was_drawn():
    drawn, empty = ({"train_loss": value} for value in (0.4, float("nan")))
    assert labelled(drawn, "private", True) == labelled(empty, "private", True)
    assert labelled(empty, "public", True) == {}


@pytest.mark.parametrize("changes", [{"adjacency": "zero_out"}, {"unit": "hospital"}, {"delta": 0.5}])
def test_a_plan_that_charges_in_other_terms_is_refused(hospital, changes):
    answer = hospital.reserve(plan_for(hospital, **changes))
    assert isinstance(answer, ClientFailure)
    assert "charged at patient level, add_remove" in answer.reason
    assert hospital.export_ledger()["events"] == []


def test_suppressed_figures_have_the_same_names_whoever_is_held_out(tmp_path, monkeypatch):
    run = small_run(privacy=PRIVACY)
    policy = list_hospitals(run)[0].model_copy(update={"declared": "private", "max_epsilon": 9.0})
    hospital = build_hospital(HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path))
    full = hospital.evaluate(1, weights_of(hospital)).metrics
    monkeypatch.setattr(hospital._parts.trainer, "evaluate", lambda weights, data: [])
    empty = hospital.evaluate(1, weights_of(hospital)).metrics
    assert full == empty
    assert {metric.value for metric in full.values()} == {None}


def test_too_few_outputs_for_the_labels_are_found_at_the_start(tmp_path):
    run = small_run(privacy=PRIVACY, model={"out_channels": 2})
    policy = list_hospitals(run)[0]
    with pytest.raises(LabelError, match=r"out_channels is 2; the labels need 3"):
        build_hospital(HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path))
