"""The benchmark of a private step: its ratios, its failures, and that it runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dp_overhead import CONTENDERS, GOALS, NOISE, Measured, figures_of, write_page
from dp_overhead_contender import CONTENDERS as BUILDERS

ROOT = Path(__file__).parents[1]


def results() -> dict[str, dict[str, Measured]]:
    """Every contender takes 2 s and 100 bytes but plain, ours and the noise; functorch has failed."""
    case = {name: Measured([1.0, 2.0, 9.0], peak_bytes=100) for name in (*CONTENDERS, NOISE)}
    case["plain"] = Measured([0.5, 1.0, 30.0], peak_bytes=200)
    case["ours"] = Measured([1.0, 1.1, 1.2], peak_bytes=50)
    case["opacus_functorch"] = Measured(failure="RuntimeError: no rule")
    return {"dp2d_b8": case, "dp3d": {**case, NOISE: Measured([0.05])}}


def test_figures_are_ratios_to_the_plain_step():
    figures = figures_of(results())
    assert figures["dp2d_b8_ratio"] == pytest.approx(1.1)
    assert figures["dp3d_memory_ratio"] == pytest.approx(0.25)
    assert figures["opacus_hooks_2d_ratio"] == pytest.approx(2.0)
    assert figures["noise_3d_share"] == pytest.approx(0.05)
    assert math.isnan(figures["opacus_functorch_3d_ratio"])
    assert {goal.figure for goal in GOALS} <= figures.keys()


def test_a_failure_is_written_with_its_reason(tmp_path):
    write_page(results(), tmp_path / "page.md")
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| dp")]
    assert len(rows) == 2 * (len(CONTENDERS) + 1)
    assert sum("failed: RuntimeError: no rule" in row for row in rows) == 2


def test_each_contender_can_be_built():
    assert {*CONTENDERS, NOISE} == BUILDERS.keys()


@pytest.mark.long
def test_it_runs_and_every_contender_clips_alike(tmp_path):
    """A contender whose clipped sum differs from the others' is recorded as failed, and would be null here."""
    command = [sys.executable, "benchmarks/dp_overhead.py", "--quick", "--json", str(tmp_path / "figures.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {goal.figure for goal in GOALS} <= figures.keys()
    assert [name for name, value in figures.items() if value is None or value <= 0] == []
