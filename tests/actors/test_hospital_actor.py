"""The plain class behind the Ray actor of a hospital."""

import shutil

from private_hospitals import two_private_hospitals

from actors.hospital_actor import HospitalActor
from medfl_ray.assembly.run import hospital_specs
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import ClientFailure, ClientUpdate, RoundPlan


def test_an_actor_that_restarts_without_its_ledger_says_why(tmp_path):
    """The plain class behind the Ray actor: whatever it is asked first, it checks the plan's head."""
    run, policies = two_private_hospitals(rounds=2)
    (spec, _) = hospital_specs(run, policies, tmp_path, tmp_path / "state")
    name = spec.policy.hospital
    plan = RoundPlan(
        job=spec.job,
        round=1,
        attempt=1,
        config_hash="",
        weights_checksum="",
        hospitals=(name,),
        num_steps={name: 1},
        learning_rate=0.01,
        mechanisms={name: mechanism_for(run, spec.policy)},
    )
    actor = HospitalActor([spec])
    reserved = actor.reserve(name, plan)
    weights = actor._hospitals[name]._parts.trainer.initial_weights(0)
    assert isinstance(actor.train(name, plan, weights), ClientUpdate)
    seen = {"round": 2, "ledger_heads": {name: reserved.ledger_head}}

    shutil.rmtree(spec.state_folder)
    answer = HospitalActor([spec]).reserve(name, plan.model_copy(update=seen))
    assert isinstance(answer, ClientFailure)
    assert "medfl-ray privacy ledger recover" in answer.reason

    (spec.state_folder / "ledger.sqlite").unlink()
    answer = HospitalActor([spec]).reserve(name, plan.model_copy(update=seen))
    assert isinstance(answer, ClientFailure)
    assert (answer.round, answer.attempt, answer.stage) == (2, 1, "start")
    assert "medfl-ray privacy ledger recover" in answer.reason
