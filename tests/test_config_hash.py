"""The hash of a configuration: another one for whatever changes the result, and for nothing else."""

import pytest
from small_runs import small_run

PRIVATE = {"enable_dp": True, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    "sections",
    [
        {"privacy": {**PRIVATE, "noise_multiplier": 1.5}},
        {"privacy": {**PRIVATE, "max_grad_norm": 0.5}},
        {"privacy": {**PRIVATE, "sample_rate": 0.25}},
        {"privacy": {**PRIVATE, "delta": 1e-7}},
        {"privacy": {"enable_dp": False}},
        {"federation": {"rounds": 7}},
        {"federation": {"seed": 6}},
        {"federation": {"fraction": 0.5}},
        {"aggregation": {"strategy": "fedadam"}},
        {"training": {"learning_rate": 0.123}},
        {"training": {"batch_size": 3}},
        {"data": {"holdout_fraction": 0.4}},
    ],
    ids=str,
)
def test_the_hash_of_a_configuration_follows_what_changes_the_result(sections):
    assert small_run(**{"privacy": PRIVATE, **sections}).config_hash != small_run(privacy=PRIVATE).config_hash


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"tags": ["other"]},
        {"output": {"report": False}},
        {"federation": {"pool": "ray"}},
        {"federation": {"baselines": ["local"]}},
        {"federation": {"num_actors": 1}},
        {"evaluation": {"calibration": True}},
    ],
    ids=str,
)
def test_the_hash_of_a_configuration_leaves_out_what_changes_no_weight(sections):
    assert small_run(**sections).config_hash == small_run().config_hash
