"""Final weights of every strategy, rule and pool are those of tests/golden/weights.json; see tests/golden_runs.py."""

import json

import pytest
from golden_runs import BY_KIND, CASES, GOLDEN, WRITTEN, assert_same, cases_of, probe, run_case

DOCUMENT = json.loads(GOLDEN.read_text())
WEIGHTS = DOCUMENT["weights"]


def marked(case):
    """Return a case that runs in every build where it stands for its kind, and before a release else."""
    return pytest.param(case, marks=pytest.mark.ci if case in BY_KIND else pytest.mark.long)


def test_every_pool_has_every_case():
    assert {pool: sorted(cases) for pool, cases in WEIGHTS.items()} == {
        pool: sorted(cases_of(pool)) for pool in WRITTEN
    }
    found = {case: entry["sha256"] for case, entry in WEIGHTS["local"].items()}
    assert found == {case: entry["sha256"] for case, entry in WEIGHTS["flower"].items()}  # bit for bit
    fedavg = found["strategy/fedavg"]
    assert {case for case, checksum in found.items() if checksum == fedavg} == {
        "strategy/fedavg",
        "strategy/ditto",  # the shared model of both is fedavg's
        "strategy/apfl",
    }
    assert len(set(found.values())) == len(CASES) - 2


@pytest.mark.parametrize("case", cases_of("local"))
def test_in_one_process(case, tmp_path):
    assert_same(run_case(case, "local", tmp_path), WEIGHTS["local"][case], DOCUMENT["probe"])


@pytest.mark.ci
@pytest.mark.parametrize("case", cases_of("flower"))
def test_over_flower(case, tmp_path):
    assert_same(run_case(case, "flower", tmp_path), WEIGHTS["flower"][case], DOCUMENT["probe"])


@pytest.mark.parametrize("case", [marked(case) for case in cases_of("ray")])
def test_on_ray_as_in_one_process(ray_cluster, case, tmp_path):
    assert_same(run_case(case, "ray", tmp_path), WEIGHTS["local"][case], DOCUMENT["probe"])


@pytest.mark.parametrize("case", [marked(case) for case in cases_of("simulation")])
def test_in_a_simulation(ray_cluster, case, tmp_path):
    assert_same(run_case(case, "simulation", tmp_path), WEIGHTS["simulation"][case], DOCUMENT["probe"])


def test_another_machines_floats_are_held_against_the_summary_alone():
    expected = WEIGHTS["local"]["strategy/fedavg"]
    near = {**expected, "norm": expected["norm"] * 1.0001, "sha256": "0" * 64}
    assert_same(near, expected, {**probe(), "cpu": "another"})
    with pytest.raises(AssertionError):
        assert_same(near, expected, probe())
    with pytest.raises(AssertionError):
        assert_same({**near, "norm": expected["norm"] * 1.01}, expected, {**probe(), "cpu": "another"})
