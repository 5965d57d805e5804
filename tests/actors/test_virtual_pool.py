"""Virtual hospitals: the same bits whatever the number of actors, faults that stay with their owner, exact accounts."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import balls

from actors.simulation.pool import VirtualPool
from actors.simulation.run import Simulation, gc_frozen, open_ledgers, simulate, where_time_went
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError, DataError
from medfl_ray.federation.events import RoundClosed, RoundTimed
from medfl_ray.federation.planning import mechanisms
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.run.folder import RunFolder

pytestmark = pytest.mark.timeout(300)


def folder_of(run, tmp_path):
    return RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})}))


def simulated(run, tmp_path, emit=lambda event: None, **options):
    policies = tuple(list_hospitals(run))
    folder = folder_of(run, tmp_path)
    return simulate(folder.run, policies, folder.path, emit, **options), folder


def final_weights(folder):
    return np.concatenate([part.ravel() for part in load_file(folder.path / "model.safetensors").values()])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Each hospital on its own, in one process: what a simulation has to give."""
    run = balls(federation={"pool": "local", "exact": True})
    policies, folder = tuple(list_hospitals(run)), folder_of(run, tmp_path_factory.mktemp("local"))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return outcome, final_weights(folder)


@pytest.mark.parametrize(
    ("exact", "numbers"),
    [
        (False, (1, 2)),
        pytest.param(False, (2, 4), marks=pytest.mark.ci),
        pytest.param(True, (1, 2, 4), marks=pytest.mark.ci),
    ],
)
def test_any_number_of_actors_gives_the_same_bits(ray_cluster, one_process, tmp_path, exact, numbers):
    found = []
    for num_actors in numbers:
        run = balls(federation={"num_actors": num_actors, "exact": exact})
        outcome, folder = simulated(run, tmp_path / str(num_actors))
        assert outcome.completed
        assert outcome.absent == ()
        found.append(outcome.weights_checksum)
    assert len(set(found)) == 1
    expected, weights = one_process
    if exact:
        assert found[0] == expected.weights_checksum
    assert np.linalg.norm(final_weights(folder) - weights) <= 1e-4 * np.linalg.norm(weights)


def open_but_one(run, hospital):
    if hospital == "hospital-002":
        raise DataError("its archive is closed today")
    return open_hospital_data(run, (hospital,))


@pytest.mark.ci
def test_one_that_cannot_open_its_data_is_left_out_and_the_others_go_on(ray_cluster, tmp_path):
    outcome, folder = simulated(balls(), tmp_path, open_data=open_but_one)
    assert outcome.completed
    assert outcome.absent == ("hospital-002",)
    receipt = folder.results()[0].receipt
    assert [(f.hospital, f.reason) for f in receipt.failures if f.stage == "train"] == [
        ("hospital-002", "its archive is closed today")
    ]
    assert len(receipt.trained) == 5


def blinding_for_one(run, hospital):
    data = open_hospital_data(run, (hospital,))
    if hospital == "hospital-004":
        draw = data.train_patches
        data.train_patches = lambda *which: (draw(*which)[0] * float("nan"), draw(*which)[1])
    return data


@pytest.mark.ci
def test_an_update_that_is_no_number_is_refused_and_the_others_of_its_group_are_kept(ray_cluster, tmp_path):
    _, folder = simulated(balls(federation={"rounds": 1}), tmp_path, open_data=blinding_for_one)
    receipt = folder.results()[0].receipt
    refused = [f for f in receipt.failures if f.stage in ("train", "screen")]
    assert [failure.hospital for failure in refused] == ["hospital-004"]
    assert len(receipt.trained) == 5


def ending_its_process_for_one(run, hospital):
    data = open_hospital_data(run, (hospital,))
    if hospital == "hospital-004":
        data.train_patches = lambda *which: os._exit(1)  # as a library does that crashes over a file
    return data


@pytest.mark.ci
def test_one_that_ends_its_process_in_every_try_takes_nobody_of_its_group_with_it(ray_cluster, tmp_path):
    run = balls(federation={"rounds": 1, "retries": 0, "num_actors": 1}, training={"hospitals_per_group": 4})
    _, folder = simulated(run, tmp_path, open_data=ending_its_process_for_one)
    receipt = folder.results()[0].receipt
    assert [(f.hospital, f.stage) for f in receipt.failures if f.stage != "evaluate"] == [("hospital-004", "train")]
    assert len(receipt.trained) == 5


def test_an_actor_that_is_killed_is_replaced_and_its_work_done_again(ray_cluster, one_process, tmp_path):
    import ray

    run = balls(federation={"exact": True, "num_actors": 2})
    policies, folder = tuple(list_hospitals(run)), folder_of(run, tmp_path)
    killed = []
    with Simulation(run, policies, folder.path, lambda event: None) as simulation:
        first = simulation.pool._actors[0]

        def kill(round):
            if round == 2 and not killed:
                killed.append(ray.get(first.process_id.remote()))
                os.kill(killed[0], signal.SIGKILL)
            return [policy.hospital for policy in policies]

        outcome = simulation.run(kill)
    assert killed
    assert outcome.completed
    assert [len(result.receipt.trained) for result in folder.results()] == [6, 6]
    assert outcome.weights_checksum == one_process[0].weights_checksum


def slow_to_open(run, hospital):
    import time

    if hospital == "hospital-006":
        time.sleep(60)
    return open_hospital_data(run, (hospital,))


@pytest.mark.ci
def test_what_is_late_at_the_deadline_is_named(ray_cluster, tmp_path):
    run = balls(federation={"rounds": 1, "deadline_s": 15, "eval_hospitals": 1}, training={"hospitals_per_group": 1})
    outcome, folder = simulated(run, tmp_path, open_data=slow_to_open)
    receipt = folder.results()[0].receipt
    assert outcome.completed
    assert "hospital-006" in {failure.hospital for failure in receipt.failures}
    assert set(receipt.trained) | {failure.hospital for failure in receipt.failures} == set(receipt.asked)
    assert all("deadline_s=15" in f.reason for f in receipt.failures if f.stage == "train")


@pytest.mark.ci
def test_cohorts_can_be_named_and_only_the_hospitals_asked_for_evaluate(ray_cluster, tmp_path):
    names = {1: ["hospital-003", "hospital-001"], 2: ["hospital-005"]}
    events = []
    outcome, folder = simulated(balls(federation={"eval_hospitals": 2}), tmp_path, events.append, select=names.get)
    assert [r.receipt.trained for r in folder.results()] == [("hospital-001", "hospital-003"), ("hospital-005",)]
    assert outcome.absent == ()
    scored = [{h for h, m in r.metrics.items() if "dice" in m} for r in folder.results()]
    assert scored[0] == scored[1]
    assert len(scored[0]) == 2
    timed = [event for event in events if event.type == "timing"]
    assert [event.num_hospitals for event in timed] == [2, 1]
    assert all(abs(sum(e.seconds.values()) - e.duration_s) < 0.2 * e.duration_s + 0.05 for e in timed)


def private(**changes):
    privacy = {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": 0.5, "max_grad_norm": 0.5, "delta": 1e-5}
    return balls(privacy=privacy, **changes)


def test_every_private_step_is_in_its_hospitals_account(ray_cluster, tmp_path):
    run = private(federation={"local_steps": 2, "fraction": 0.5, "local_epochs": None})
    outcome, folder = simulated(run, tmp_path)
    assert outcome.completed
    asked = [result.receipt.asked for result in folder.results()]
    for policy in list_hospitals(run):
        rounds = sum(policy.hospital in names for names in asked)
        account = open_ledgers(run, list_hospitals(run), folder.path).spent([policy.hospital])[policy.hospital]
        assert account.epsilon == pytest.approx(epsilon_spent((Segment(1.0, 0.5, 2 * rounds),), 1e-5), abs=0.01)
    spent = folder.results()[-1].receipt.spent
    assert set(spent) == set(asked[-1])
    assert all((one.unit, one.adjacency, one.delta) == ("patient", "add_remove", 1e-5) for one in spent.values())


@pytest.mark.ci
def test_nobody_trains_without_a_reservation(ray_cluster, tmp_path):
    run = private(federation={"rounds": 1})
    policies, folder = tuple(list_hospitals(run)), folder_of(run, tmp_path)
    with Simulation(run, policies, folder.path, lambda event: None) as simulation:
        simulation.pool.reserve = lambda plan: dict.fromkeys(plan.hospitals)
        simulation.run()
    receipt = folder.results()[0].receipt
    assert receipt.trained == ()
    assert {failure.reason for failure in receipt.failures} == {"no reservation is open for this round"}


@pytest.mark.ci
def test_one_over_its_budget_is_left_out(ray_cluster, tmp_path):
    run = private(federation={"rounds": 3})
    single = next(iter(mechanisms(run, list_hospitals(run)).values()))
    one_round = epsilon_spent((Segment(1.0, 0.5, single.num_steps),), 1e-5)
    run = private(federation={"rounds": 3})
    run = run.model_copy(update={"privacy": run.privacy.model_copy(update={"epsilon": one_round * 1.01})})
    outcome, folder = simulated(run, tmp_path)
    receipts = [result.receipt for result in folder.results()]
    assert not outcome.completed
    assert len(receipts[0].trained) == 6
    assert receipts[1].trained == ()
    assert all("its budget is" in failure.reason for failure in receipts[1].failures)


@pytest.mark.ci
def test_hospital_level_noise_gets_every_update(ray_cluster, tmp_path):
    run = balls(
        privacy={
            "enable_dp": True,
            "unit": "hospital",
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "hospital_level": {"clip_norm": 0.5},
        },
        aggregation={"weighting": "uniform"},
        federation={"fraction": 0.5},
    )
    seen = []
    outcome, folder = simulated(run, tmp_path, seen.append)
    assert outcome.completed
    assert all(result.receipt.spent["federation"].unit == "hospital" for result in folder.results())
    assert all(result.receipt.trained == () for result in folder.results())  # the cohort is secret
    assert [event for event in seen if isinstance(event, RoundTimed)] == []


@pytest.mark.parametrize(("secret", "timed"), [(True, 0), (False, 1)])
def test_hole_a_simulation_does_not_say_how_long_a_secret_cohort_took(secret, timed):
    """Its processes' seconds are in proportion to the hospitals that they have trained."""
    pool = SimpleNamespace(notes=[], seconds={"train": 6.0, "wall": 5.0}, num_actors=2)
    result = SimpleNamespace(
        round=1, duration_s=0.0 if secret else 7.0, receipt=SimpleNamespace(secret_cohort=secret, asked=("a",))
    )
    seen = []
    Simulation._timed(SimpleNamespace(pool=pool), seen.append, RoundClosed.model_construct(result=result))
    assert [type(event).__name__ for event in seen] == ["RoundClosed", *["RoundTimed"] * timed]


def test_what_a_simulation_cannot_do_is_refused(ray_cluster):
    run = balls(federation={"baselines": ("local",)})
    with pytest.raises(ConfigError, match="baselines"):
        VirtualPool(run, list_hospitals(run))
    run = private()
    real = [policy.model_copy(update={"declared": "public"}) for policy in list_hospitals(run)]
    with pytest.raises(ConfigError, match="not synthetic"):
        VirtualPool(run, real)
    simulation = Simulation(run, tuple(list_hospitals(run)), Path("unused"), lambda event: None)
    with simulation, pytest.raises(ConfigError, match="not warmed up"):
        simulation.warm_up(["hospital-001"])


def test_the_parts_of_a_round_add_up():
    seconds = {"train": 6.0, "data": 2.0, "sum": 0.5, "wall": 5.0, "evaluate": 1.0}
    parts = where_time_went(SimpleNamespace(num_actors=2, seconds=seconds), 7.0)
    assert parts == {"train": 3.0, "data": 1.0, "wait": 0.75, "aggregate": 1.25, "evaluate": 1.0}
    assert sum(parts.values()) == 7.0


@pytest.fixture
def nothing_frozen():
    was_frozen = gc.get_freeze_count() > 0  # the whole session's tests are
    gc.unfreeze()
    yield
    if was_frozen:
        gc.freeze()


def test_a_run_leaves_the_collection_of_garbage_as_it_was(nothing_frozen):
    with gc_frozen():
        assert gc.get_freeze_count() > 0
        with gc_frozen():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() > 0, "the inner run has let go of what the outer one counts on"
    assert gc.get_freeze_count() == 0
