"""Federations of fewer hospitals as Ray tasks: the same scores as one after the other in this process."""

import threading

import pytest
from small_runs import balls

from actors.coalitions import coalition_tasks, may_leave_home
from medfl_ray.assembly.run import RunExtras, hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.study_records import StudiesRecord


def small(**changes):
    phantom = {"preset": "balls", "num_hospitals": 3, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}
    federation = {"rounds": 1, "pool": "local", "local_epochs": 1}
    return balls(data={"phantom": phantom}, federation=federation, **changes)


def studies(run, tmp_path, at_once):
    policies = tuple(list_hospitals(run))
    folder = RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})}))
    specs = hospital_specs(run, policies, folder.path)
    extras = RunExtras(train_coalitions=coalition_tasks(specs) if at_once else None)
    run_in_process(run, policies, folder.path, local_pool(specs), lambda event: None, threading.Event(), extras)
    return StudiesRecord.model_validate_json((folder.path / "studies.json").read_text())


@pytest.mark.ci
def test_tasks_give_the_same_contributions(ray_cluster, tmp_path):
    run = small(evaluation={"contributions": "shapley", "leave_one_out": True, "truncation": 0.0})
    assert studies(run, tmp_path / "tasks", at_once=True) == studies(run, tmp_path / "turn", at_once=False)


def test_data_stay_at_home_where_they_are_private_pinned_or_charged(tmp_path):
    def specs(run, **declared):
        policies = tuple(policy.model_copy(update=declared) for policy in list_hospitals(run))
        return hospital_specs(run, policies, tmp_path / "run", tmp_path / "state")

    plain = small()
    name = list_hospitals(plain)[0].hospital
    assert may_leave_home(specs(plain), {"CPU": 4})
    assert not may_leave_home(specs(plain), {"CPU": 4, "GPU": 1})
    assert not may_leave_home(specs(plain), {"CPU": 4, f"hospital:{name}": 1})
    assert not may_leave_home(specs(plain, declared="private"), {"CPU": 4})
    assert not may_leave_home(specs(small(privacy={"enable_dp": True, "epsilon": 4.0})), {"CPU": 4})
