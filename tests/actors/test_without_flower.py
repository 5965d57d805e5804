"""All but a Flower run works in a Python that cannot import Flower, and a Flower run says what it lacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_run

ROOT = Path(__file__).parents[2]
BLOCK = """
import importlib.abc, sys

class NoFlower(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flwr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoFlower())
"""


def python_without_flower(code, *arguments):
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_block_blocks():
    result = python_without_flower("import flwr.app")
    assert result.returncode == 1
    assert "No module named 'flwr" in result.stderr


@pytest.mark.parametrize("command", ["run", "simulate", "tune", "deploy", "doctor", "models list"])
def test_a_command_gives_its_help(command):
    code = "from medfl_ray.cli.main import app; app(sys.argv[1:] + ['--help'], standalone_mode=False)\n"
    result = python_without_flower(code + "assert 'flwr' not in sys.modules", *command.split())
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Usage:" in result.stdout


def test_what_runs_hospitals_simulations_searches_and_servers_imports_no_flower():
    modules = (
        "actors.coordinator, actors.flower.hospital, actors.flower.pool, actors.flower.rule, actors.flower.run, "
        "actors.hospital_actor, actors.ray_pool, actors.simulation.run, actors.train, actors.simulation.hospitals, "
        "actors.simulation.pool, medfl_ray.assembly.hospital, medfl_ray.assembly.run, serve.app, tune.search"
    )
    result = python_without_flower(f"import {modules}\nassert 'flwr' not in sys.modules")
    assert result.returncode == 0, result.stderr[-2000:]


def run_without_flower(tmp_path, **sections):
    path = tmp_path / "run.yaml"
    path.write_text(small_run(output={"directory": str(tmp_path / "runs")}, **sections).model_dump_json())
    code = "from medfl_ray.cli.main import main; main()"
    return python_without_flower(f"sys.argv[1:1] = ['run']\n{code}", path)


def test_a_federation_runs(tmp_path):
    result = run_without_flower(tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "all 2 rounds were published" in result.stdout


def test_a_run_with_a_strategy_of_flowers_says_what_it_lacks(tmp_path):
    result = run_without_flower(tmp_path, aggregation={"strategy": "flower"})
    assert result.returncode != 0
    said = " ".join((result.stdout + result.stderr).split())
    assert "aggregation.strategy 'flower' needs the package flwr" in said
    assert "Traceback" not in said
