"""The coordinator killed at named points, and a cluster under fire, by the benchmark that measures both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_kills import FAILPOINTS, NUM_ROUNDS, configure, judge_ledgers, kill_and_resume, lost_rounds, warm_up
from ray_head import without_ray

from medfl_ray.store.run.folder import RunFolder

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def chaos(tmp_path, *arguments):
    """Run the benchmark in a process of its own, which forks, and return its figures."""
    ended = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(tmp_path / "figures.json"), *arguments],
        env=without_ray(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((tmp_path / "figures.json").read_text())


def check_kills(figures, at_least):
    assert figures["kills"] >= at_least
    assert figures["undercounts"] == 0
    assert figures["overcharged_attempts_max"] <= 1
    assert figures["lost_rounds"] == 0
    assert figures["resume_minus_cold_s_max"] <= 2
    assert figures["model_hash_equal"] == 1


def test_killed_at_some_points_nothing_is_lost_or_undercounted(tmp_path):
    check_kills(chaos(tmp_path, "--part", "kills", "--quick"), 8)


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_killed_at_every_point_nothing_is_lost_or_undercounted(tmp_path):
    assert len(FAILPOINTS) >= 12
    check_kills(chaos(tmp_path, "--part", "kills", "--repeats", "1"), len(FAILPOINTS))


@pytest.mark.long
@pytest.mark.timeout(420)
def test_on_a_cluster_under_fire_no_round_hangs_and_nothing_is_left(tmp_path):
    figures = chaos(tmp_path, "--part", "cluster", "--minutes", "2", "--node-every", "45")
    assert figures["hospital_kills"] >= 3
    assert figures["node_losses"] >= 1
    assert figures["rounds_published"] >= 5
    assert figures["hung_rounds"] == 0
    assert figures["leaked_actors"] == 0
    assert figures["cluster_undercounts"] == 0
    assert figures["cluster_lost_rounds"] == 0
    assert figures["rss_slope_mb_per_round"] <= 0.5


def test_the_judge_finds_a_training_that_is_not_charged_and_a_round_that_is_lost(tmp_path):
    warm_up(tmp_path)
    folder = RunFolder.open(next((tmp_path / "True").glob("*-chaos"))).path
    trace = tmp_path / "trace"
    names = sorted(path.name for path in (tmp_path / "True" / "state").iterdir() if not path.name.startswith("_"))
    trace.write_text("".join(f"{name} {number} 1 0.0\n" for name in names for number in range(1, NUM_ROUNDS + 1)))
    assert judge_ledgers(folder, trace) == (False, 0)
    assert lost_rounds(folder) == 0
    with trace.open("a") as file:
        file.write(f"{names[0]} 2 9 0.0\n")
    assert judge_ledgers(folder, trace) == (True, 0)
    lines = (folder / "receipts.jsonl").read_text().splitlines()
    (folder / "receipts.jsonl").write_text("".join(line + "\n" for line in lines[:-1]))
    assert lost_rounds(folder) == 1


def test_a_victim_that_is_not_killed_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="not with SIGKILL"):
        kill_and_resume(tmp_path, False, "no.such.point", 1)
    assert configure(False, tmp_path).federation.rounds == NUM_ROUNDS
