"""A simulation that an older version left in the middle goes on to its end."""

import shutil
from pathlib import Path

import pytest

from actors.simulation.run import simulate
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2026_12"


@pytest.mark.ci
def test_an_interrupted_simulation_goes_on(ray_cluster, tmp_path):
    shutil.copytree(FIXTURES / "runs" / "simulation_interrupted", tmp_path / "run")
    for path in tmp_path.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    folder = RunFolder.open(tmp_path / "run")
    outcome = simulate(folder.run, tuple(list_hospitals(folder.run)), folder.path, lambda event: None)
    assert outcome.completed
    receipts = folder.signed_receipts()
    assert [(receipt.round, receipt.published) for receipt in receipts] == [(1, True), (2, True), (3, True)]
