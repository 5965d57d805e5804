"""medfl-ray simulate as a process of its own: it trains, says where the time went, and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import balls

from medfl_ray.config.files import dump_yaml

pytestmark = [pytest.mark.ci, pytest.mark.timeout(300)]


def simulate(tmp_path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    return subprocess.run(
        [sys.executable, "-m", "actors.simulation.run", *map(str, arguments)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2]), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_simulation_trains_prints_its_rate_and_continues(tmp_path):
    (tmp_path / "sim.yaml").write_text(dump_yaml(balls(output={"directory": "runs"})), encoding="utf-8")
    done = simulate(tmp_path, "sim.yaml", "--actors", "2", "--set", "federation.rounds=2")
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stdout
    assert "hospitals/s" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert [len(receipt["trained"]) for receipt in receipts] == [6, 6]
    assert (folder / "model.safetensors").exists()
    again = simulate(tmp_path, "--resume", folder)
    assert "Traceback" not in again.stderr


def test_what_a_simulation_cannot_do_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "sim.yaml").write_text(dump_yaml(balls(output={"directory": "runs"})), encoding="utf-8")
    refused = simulate(tmp_path, "sim.yaml", "--set", "federation.baselines=[local]")
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, refused.stderr
    assert not any((tmp_path / "runs").glob("*/receipts.jsonl"))
