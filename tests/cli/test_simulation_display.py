"""What a simulation prints: hospitals per second, where the time went, and who failed."""

import pytest
from rich.console import Console

from medfl_ray.cli.simulation_display import MARKS, SimulationDisplay, stacked_bar
from medfl_ray.federation.events import HospitalState, Notice, PhaseStarted, RoundClosed, RoundTimed
from medfl_ray.messages import Metric, PrivacySpent, Receipt, RoundResult

SECONDS = {"train": 1.5, "data": 0.2, "wait": 0.1, "aggregate": 0.1, "evaluate": 0.1}


def closed(spent=None):
    receipt = Receipt(
        job="job",
        round=1,
        attempt=1,
        plan_hash="",
        config_hash="",
        asked=("a", "b"),
        trained=("a", "b"),
        failures=(),
        update_hashes={},
        spent=spent or {},
        weights_before="",
        weights_after=None,
        published=True,
        ended_at="",
    )
    metrics = {name: {"dice": Metric(value=value, label="public")} for name, value in {"a": 0.5, "b": 0.7}.items()}
    return RoundClosed(result=RoundResult(round=1, receipt=receipt, metrics=metrics, duration_s=2.0))


def shown(*events):
    console = Console(record=True, width=200, force_terminal=False, file=None, quiet=False)
    with SimulationDisplay(3, console) as display:
        for event in events:
            display.update(event)
    return console.export_text()


def timed(round=1, hospitals=100, seconds=2.0):
    return RoundTimed(round=round, num_hospitals=hospitals, duration_s=seconds, seconds=SECONDS)


def test_a_round_shows_its_rate_its_score_and_its_bar():
    text = shown(PhaseStarted(name="federated"), closed(), timed())
    line = next(line for line in text.splitlines() if "1/3" in line)
    assert "50.0" in line
    assert "Dice 0.600 (mean of 2)" in line
    assert line.count(MARKS["train"]) == 30


def test_an_epsilon_stands_with_unit_delta_and_adjacency():
    text = shown(closed({"a": PrivacySpent(epsilon=3.2, delta=1e-5, budget=8.0)}), timed())
    assert "epsilon so far up to 3.20 (patient-level, delta=1e-05, add/remove)" in text


def test_the_summary_is_the_median_of_the_rounds_after_the_first():
    text = shown(timed(1, seconds=50.0), timed(2, seconds=2.0), timed(3, seconds=4.0), timed(4, seconds=5.0))
    assert "median of 3 rounds: 4.00 s, 25.0 hospitals/s" in text
    assert "75.0 %" in text


def test_the_first_failures_are_named_and_the_rest_counted():
    failures = [HospitalState(hospital=f"h{i}", state="failed", detail="disk full") for i in range(5)]
    text = shown(*failures, closed(), Notice(message="note: as a group"))
    assert "failed: h2: disk full" in text
    assert "h3" not in text
    assert "and 2 more, in receipts.jsonl" in text
    assert "note: as a group" in text


@pytest.mark.parametrize("width", [1, 7, 40])
@pytest.mark.parametrize("seconds", [{}, {"wait": 2.0}, SECONDS])
def test_a_bar_is_as_wide_as_asked(seconds, width):
    bar = stacked_bar(seconds, width).plain
    assert len(bar) == width
    assert bar.isspace() == (not seconds)
