"""Virtual hospitals in this process: scored together as alone, within their memory, looking ahead without effect."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import balls

from actors.simulation.hospitals import VirtualHospitals
from actors.simulation.pool import cache_of_each
from actors.simulation.work import Assignment, EvaluationJob, HospitalTurn
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import DataError
from medfl_ray.messages import ClientFailure


def prepared(run, open_data=None, **options):
    policies = list_hospitals(run)
    hospitals = VirtualHospitals(run, "synthetic", open_data, **options)
    hospitals.describe(policies[0].hospital, policies[0])
    layout, weights = hospitals.first_weights(1, 2)
    assert layout.size == len(weights)
    return hospitals, tuple(policy.hospital for policy in policies), weights


def scored(run, **options):
    hospitals, names, weights = prepared(run, **options)
    return [answer.model_dump(exclude={"pictures"}) for answer in hospitals.evaluate(EvaluationJob(1, names), weights)]


def test_hospitals_scored_together_score_as_each_alone():
    together, alone = scored(balls()), scored(balls(federation={"exact": True}))
    assert len(together) == 6
    assert all(answer["metrics"]["dice"]["value"] is not None for answer in together)
    assert together == alone


def test_a_hospital_that_cannot_be_scored_does_not_take_the_others_with_it():
    def open_data(run, hospital):
        data = open_hospital_data(run, (hospital,))
        if hospital == broken:
            return SimpleNamespace(channels=data.channels, labels=data.labels, holdout=Broken(), num_train_patients=3)
        return data

    class Broken:
        def __iter__(self):
            raise DataError("case 1 of 2 cannot be read")

    broken = list_hospitals(balls())[2].hospital
    hospitals, names, weights = prepared(balls(), open_data)
    answers = hospitals.evaluate(EvaluationJob(1, names), weights)
    failed = [answer for answer in answers if isinstance(answer, ClientFailure)]
    assert [(one.hospital, one.stage, one.reason) for one in failed] == [
        (broken, "evaluate", "case 1 of 2 cannot be read")
    ]
    assert len(answers) == 6


@pytest.mark.parametrize("options", [{"cache_bytes": 3000}, {"looks_ahead": True}])
def test_neither_little_memory_nor_looking_ahead_changes_a_bit(options):
    assert np.array_equal(summed(), summed(**options))


def summed(**options):
    hospitals, names, weights = prepared(balls(), **options)
    turns = [HospitalTurn(name, index, 6, 2) for index, name in enumerate(names)]
    groups = tuple(tuple(turns[start : start + 2]) for start in range(0, len(turns), 2))
    finished = hospitals.train(Assignment(1, 1, 0.05, None, True, 2, groups), weights)
    assert not finished.failures
    if "cache_bytes" in options:
        assert hospitals._data._budget.used <= options["cache_bytes"]
    return np.stack([update.delta for update in finished.updates])


def test_the_memory_of_prepared_images_is_configured_or_part_of_the_machine():
    assert cache_of_each(balls(data={"cache_mb": 5}), 4, 1e9) == 5 * 2**20
    assert cache_of_each(balls(), 4, 8e9) == 1e9
    assert cache_of_each(balls(), 4, None) is None
