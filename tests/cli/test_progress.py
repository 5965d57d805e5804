"""The live view and its plain lines, drawn on consoles of several kinds."""

import io
import math

import pytest
from rich.console import Console

from medfl_ray.cli.progress import RunDisplay, clock_words, spent_words
from medfl_ray.config.files import parse_run_config
from medfl_ray.federation.events import (
    BaselineProgress,
    HospitalState,
    Notice,
    PhaseStarted,
    RoundClosed,
    RunEnded,
)
from medfl_ray.messages import ClientFailure, Metric, PrivacySpent, Receipt, RoundResult


def a_run(dp=True):
    privacy = {"epsilon": 8} if dp else {"enable_dp": False}
    return parse_run_config({"name": "demo", "data": {"phantom": {}}, "federation": {"rounds": 4}, "privacy": privacy})


def closed(number, dice=0.5, failures=(), published=True, trained=("A", "B")):
    spent = {h: PrivacySpent(epsilon=number * 1.5, delta=1e-5, budget=20.0) for h in trained}
    receipt = Receipt(
        job="j", round=number, attempt=1, plan_hash="", config_hash="", asked=("A", "B", "C"), trained=trained,
        failures=failures, update_hashes={}, spent=spent, weights_before="", weights_after="x" if published else None,
        published=published, ended_at="",
    )  # fmt: skip
    label = "public" if dice is not None else "suppressed"
    metrics = {h: {"dice": Metric(value=dice, label=label)} for h in trained}
    return RoundClosed(result=RoundResult(round=number, receipt=receipt, metrics=metrics, duration_s=10.0))


def lost(name, number=1, stage="train"):
    return ClientFailure(hospital=name, round=number, attempt=1, stage=stage, reason="process\nended [red]early")


def a_story():
    yield PhaseStarted(name="start", total_rounds=4)
    yield from (HospitalState(hospital=h, state="waiting") for h in "AB")
    yield HospitalState(hospital="C", state="failed", detail="its folder is empty")
    yield PhaseStarted(name="federated", total_rounds=4)
    for number in range(1, 5):
        yield HospitalState(hospital="A", state="training", num_steps=5)
        yield HospitalState(hospital="A", state="done")
        yield HospitalState(hospital="B", state="failed", detail="process ended")
        yield closed(number, 0.1 * number, (lost("B", number),))
    yield PhaseStarted(name="baselines", total_rounds=2)
    yield BaselineProgress(baseline="A", done=1, total=2)
    yield RunEnded(message="all 4 rounds were published")


def play(console, events, dp=True):
    with RunDisplay(a_run(dp), console, clock=lambda: 75.0) as display:
        for event in events:
            display.update(event)
    return display


def drawn(display, width, height=30):
    console = Console(file=io.StringIO(), width=width, height=height, record=True, color_system=None)
    display._console = console
    console.print(display.render())
    return console.export_text()


def test_a_log_gets_at_most_one_line_per_round_and_no_control_codes():
    file = io.StringIO()
    play(Console(file=file, width=60), a_story())
    lines = file.getvalue().splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert len(rounds) == 4
    assert "\x1b" not in file.getvalue()
    assert "C cannot take part: its folder is empty" in lines
    assert rounds[1].startswith("round 2/4; 2 of 3 hospitals trained; Dice 0.200 (mean of 2)")
    assert (
        "epsilon so far at most 3.00 (patient, delta=1e-5, add/remove; budget of the run 8, lifetime budget 20)"
        in rounds[1]
    )
    assert "about 0:20 left" in rounds[1]
    assert "B failed: process ended [red]early" in rounds[1]
    assert lines[-1] == "all 4 rounds were published"


def test_an_unpublished_round_says_so_and_does_not_count():
    file = io.StringIO()
    display = play(Console(file=file, width=200), [closed(1, published=False)])
    assert "NOT PUBLISHED" in file.getvalue()
    assert "round 0 of 4" in drawn(display, 100)


def test_suppressed_scores_stay_suppressed():
    file = io.StringIO()
    display = play(Console(file=file, width=200), [closed(1, dice=None)])
    assert "Dice suppressed" in file.getvalue()
    assert drawn(display, 100).count("suppressed") == 2


def test_the_table_shows_every_hospital_with_score_epsilon_and_its_terms():
    display = play(Console(file=io.StringIO()), [*list(a_story())[:-4], closed(2, 0.4)])
    text = drawn(display, 120)
    assert "round 3 of 4" in text or "round 4 of 4" in text
    row = next(line for line in text.splitlines() if line.startswith("A "))
    assert "0.400" in row
    assert "3.00 / 20" in row
    assert "epsilon so far of each account: (patient, delta=1e-5, add/remove; budget of the run 8, lifetime" in text
    assert "its folder is empty" in text


def test_without_privacy_no_epsilon_column():
    text = drawn(play(Console(file=io.StringIO()), a_story(), dp=False), 100)
    assert "epsilon so far" not in text
    assert "differential privacy is off" in text


@pytest.mark.parametrize("width", [10, 20, 40, 60, 90, 200])
def test_no_line_is_wider_than_the_terminal(width):
    display = play(Console(file=io.StringIO()), a_story())
    assert all(len(line) <= width for line in drawn(display, width).splitlines())


def test_many_hospitals_fit_the_height_and_failures_come_first():
    events = [HospitalState(hospital=f"h{n:03d}", state="waiting") for n in range(300)]
    display = play(Console(file=io.StringIO()), [*events, HospitalState(hospital="h250", state="failed", detail="x")])
    lines = drawn(display, 100, height=24).splitlines()
    assert len(lines) <= 24
    assert any("h250" in line for line in lines)
    assert any("and 282 more" in line for line in lines)


@pytest.mark.parametrize("width", [15, 50, 120])
def test_a_terminal_gets_a_live_table(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=20, legacy_windows=False, _environ={})
    play(console, a_story())
    assert "\x1b[" in file.getvalue()
    assert "all 4" in file.getvalue()


def test_plain_mappings_drive_it_as_well_as_events():
    file = io.StringIO()
    play(Console(file=file, width=200), [event.model_dump(mode="json") for event in a_story()])
    other = io.StringIO()
    play(Console(file=other, width=200), a_story())
    assert file.getvalue() == other.getvalue()


def test_notices_are_printed_as_they_are():
    file = io.StringIO()
    play(Console(file=file, width=20), [Notice(message="see [bold]http://127.0.0.1:8265[/bold] for the dashboard")])
    assert file.getvalue() == "see [bold]http://127.0.0.1:8265[/bold] for the dashboard\n"


def test_words():
    assert clock_words(59.6) == "1:00"
    assert clock_words(3725) == "1:02:05"
    assert spent_words(PrivacySpent(epsilon=2, delta=1e-5, budget=None)) == "2.00"
    assert spent_words(PrivacySpent(epsilon=math.inf, delta=1e-5, budget=8.0)) == "infinite (unprotected) / 8"
