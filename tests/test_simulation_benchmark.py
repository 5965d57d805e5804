"""The benchmark of simulations: its ratios, its page, who is left out, and the tables of the documentation."""

import json
import math
import sys
from pathlib import Path

import fill_tables
import harness
import numpy as np
import pytest
import simulation
from simulation_results import GOALS, RATIOS, Run, figures_of, goals_here, page, update_error, weights_errors

ROOT = Path(__file__).parents[1]


def record(seconds, pss=100, ready=2.0, warm=3.0, rc=0, timed_out=False):
    """What the peers' measure.py writes of a command of two rounds."""
    return {
        "rc": rc,
        "timed_out": timed_out,
        "rounds": [seconds, seconds],
        "rounds_wall": 2 * seconds,
        "clients_per_s": 1 / seconds,
        "ready": ready,
        "warm_wall": [warm],
        "peak_pss_mb": pss,
        "cpu": 1.0,
        "load_before": 0.1,
        "other_busy": 0.2,
    }


def some_runs():
    """Ours is 2, 4 and 3 times as fast as raw, in a machine that slows down; exact failed in its second turn."""
    return [
        *(Run("S1", "raw", turn, record(seconds)) for turn, seconds in enumerate((4.0, 16.0, 12.0), start=1)),
        *(Run("S1", "ours", turn, record(seconds)) for turn, seconds in enumerate((2.0, 4.0, 4.0), start=1)),
        Run("S1", "flower", 1, record(8.0, ready=10.0, warm=10.0)),
        Run("S1", "exact", 1, record(4.0)),
        Run("S1", "exact", 2, record(1.0, rc=1)),
    ]


def test_a_figure_is_the_median_of_the_ratios_within_a_turn():
    figures = figures_of(some_runs(), {})
    assert figures["s1_vs_raw"] == pytest.approx(3.0)
    assert figures["s1_vs_flower"] == pytest.approx(4.0)
    assert figures["first_round_vs_flower"] == pytest.approx(5.0 / 20.0)
    assert figures["exact_vs_raw"] == pytest.approx(1.0)
    assert "s2_vs_raw" not in figures
    assert "weights_error" not in figures


def test_each_goal_is_of_a_figure():
    assert {goal.figure for goal in GOALS} == {*RATIOS, "weights_error"}


@pytest.mark.parametrize(("flags", "asked"), [(["avx2"], False), (["avx512_bf16"], True), (["amx_bf16"], True)])
def test_bfloat16_is_asked_for_where_the_processor_has_it(flags, asked):
    assert ("s3_bf16_vs_raw" in {goal.figure for goal in goals_here(flags)}) is asked


def test_weights_are_compared_with_the_plain_loop_of_the_same_turn(tmp_path):
    initial = np.full(4, 10, dtype=np.float32)
    for turn, error in ((1, 0.01), (2, 0.5)):
        np.save(tmp_path / f"S1.raw.{turn}.npy", initial + np.float32(turn))
        np.save(tmp_path / f"S1.ours.{turn}.npy", initial + np.float32(turn + error))
        np.save(tmp_path / f"S1.bf16.{turn}.npy", initial)
    runs = [Run("S1", name, turn, record(1.0)) for name in ("raw", "ours", "bf16") for turn in (1, 2)]
    errors = weights_errors(runs, tmp_path, lambda case: initial)
    assert errors == pytest.approx({("S1", "ours"): 0.25, ("S1", "bf16"): 1.0}, rel=1e-5)
    assert figures_of(runs, errors)["weights_error"] == pytest.approx(0.25, rel=1e-5)


def test_weights_that_are_no_numbers_are_no_small_error():
    nothing = np.full(2, np.nan, dtype=np.float32)
    error = update_error(nothing, np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.float32))
    assert math.isnan(figures_of([], {("S1", "ours"): error, ("S2", "ours"): 1e-6})["weights_error"])


def test_the_page_has_ranges_failures_and_what_was_not_measured():
    text = page(some_runs(), {("S1", "ours"): 2e-5}, GOALS, "a machine", ["`pfl` was not measured."])
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    assert "2 to 4" in rows["`s1_vs_raw`"]
    assert "holds" in rows["`s1_vs_raw`"]
    assert "not measured" in rows["`s2_vs_pfl`"]
    assert "2e-05" in rows["`weights_error`"]
    assert "| S1 | exact | 1 of 2 |" in text
    assert "- `pfl` was not measured." in text


def test_everybody_runs_once_a_turn_and_another_one_first():
    assert list(simulation.turns(2, ["a", "b", "c"])) == [(1, "a"), (1, "b"), (1, "c"), (2, "b"), (2, "c"), (2, "a")]


def test_a_python_that_is_missing_or_lacks_the_package_is_noticed(tmp_path):
    assert simulation.versions_of(tmp_path / "python", ["torch"]) is None
    assert simulation.versions_of(Path(sys.executable), ["no-such-distribution"]) is None
    assert simulation.versions_of(Path(sys.executable), ["numpy"]) == f"numpy {np.__version__}"


def test_kept_runs_are_read_again_but_those_that_failed(tmp_path):
    for name, content in (("S1.raw.1", record(1.0)), ("S1.ours.1", record(1.0, rc=1)), ("S2.raw.1", record(1.0))):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(content) + "\n")
    assert [(run.case, run.contender, run.turn) for run in simulation.kept_runs(tmp_path, ["S1"])] == [("S1", "raw", 1)]


def test_json_without_a_file_is_all_that_the_standard_output_gets(tmp_path, capsys):
    with harness.benchmark("test", ["--json"]) as options:
        harness.report(options, {"ratio": 2.0})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ratio": 2.0}
    assert "cores" in captured.err


def test_tables_are_put_in_and_put_in_again(tmp_path):
    page_text = (
        "a\n<!-- table: simulation -->\nold\n<!-- end of table -->\nb\n<!-- table: no -->\n<!-- end of table -->\n"
    )
    (tmp_path / "simulation.md").write_text("# Title\n\n| x |\n")
    filled = fill_tables.fill(page_text, tmp_path)
    assert "| x |" in filled
    assert fill_tables.MISSING in filled
    assert "old" not in filled
    assert "Title" not in filled
    assert fill_tables.fill(filled, tmp_path) == filled


def test_the_tables_of_the_documentation_are_those_of_the_results():
    assert fill_tables.main(["--check", str(ROOT / "docs" / "performance.md")]) == 0


def test_the_distance_from_float64_is_told_for_each_contender(tmp_path, monkeypatch):
    options = harness.Options(quick=False, out=tmp_path, json=None, own=None)
    monkeypatch.setattr(simulation, "initial_weights", lambda peers, case: np.zeros(2, np.float32))
    np.save(tmp_path / "S1.float64.npy", np.array([3.0, 4.0]))
    np.save(tmp_path / "S1.raw.1.npy", np.array([3.0, 4.5], np.float32))
    np.save(tmp_path / "S1.ours.1.npy", np.array([3.0, 4.0], np.float32))
    note = simulation.float64_note(options, tmp_path, "S1")
    assert "1.0e-01 for `raw`" in note
    assert "0.0e+00 for `ours`" in note
