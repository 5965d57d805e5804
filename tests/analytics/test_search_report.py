"""The report of a search: self-contained, pictures first, and of a search of the best alone nothing but the best."""

import math
import re
from dataclasses import replace

import pytest

from medfl_ray.analytics.search_report import headline, render_search_report
from medfl_ray.analytics.search_summary import SearchSummary, TrialRow


def row(number, epsilon, dice, state="finished", **changes):
    parameters = {
        "epsilon": epsilon,
        "strategy": ("fedavg", "fedadam")[number % 2],
        "learning_rate": 0.01 * (number + 1),
    }
    return TrialRow(
        number, state, parameters, epsilon, dice, dice - 0.05, dice + 0.05, 1e6 * (number + 1), 6, **changes
    )


SUMMARY = SearchSummary(
    name="example",
    rows=[
        row(0, 2.0, 0.4, on_front=True),
        row(1, 4.0, 0.7, on_front=True, recommended=True),
        row(2, 8.0, 0.1),
        row(3, 9.0, 0.05, "stopped"),
    ],
    failed={4: "it has <no> budget"},
    num_trials=5,
    planned_rounds=6,
    accounting="public",
    words="Nothing was charged.",
    delta=1e-5,
    worst_case={},
    selected=None,
    importance={"epsilon": 0.6, "learning_rate": 0.3, "strategy": 0.1},
    judged_on="synthetic held-out patients",
    recommended_text="name: example",
    config_text="name: search",
    wanted_dice=None,
)


def test_pictures_come_first_and_nothing_is_loaded_from_elsewhere():
    html = render_search_report(SUMMARY)
    assert html.index("<img") < html.index("In short") < html.index("Trials</h2>")
    assert html.count('<img src="data:image/svg+xml;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "it has &lt;no&gt; budget" in html


def test_beside_every_epsilon_stand_unit_delta_and_adjacency():
    assert "at epsilon 4.00 (unit patient, delta 1e-05, adjacency add/remove)" in headline(SUMMARY)
    html = render_search_report(SUMMARY)
    assert "trial 1: epsilon 4.00, Dice 0.700 (0.650 to 0.750), 2 MB" in html
    assert "stopped after round 6" in html


@pytest.mark.parametrize(
    ("accounting", "words"),
    [("public", "nothing charged by the search"), ("compose", "every trial charged, PLD")],
)
def test_the_report_says_which_accounting_applied(accounting, words):
    html = render_search_report(replace(SUMMARY, accounting=accounting, worst_case={"north": 7.123}))
    assert words in html
    assert "Worst case, north" in html
    assert "7.13" in html


def test_of_a_search_of_the_best_alone_nothing_else_is_shown():
    best = [trial for trial in SUMMARY.rows if trial.recommended]
    alone = replace(SUMMARY, rows=best, failed={}, accounting="select", selected=12.5, importance=None)
    html = render_search_report(alone)
    assert "repeat-and-select" in html
    assert "12.50" in html
    assert "Trials</h2>" not in html
    assert "<img" not in html
    assert "5 trials" not in html


def test_a_search_in_which_nothing_finished_still_has_a_report():
    html = render_search_report(replace(SUMMARY, rows=[], recommended_text="", importance=None))
    assert "No trial finished" in html


def test_a_wanted_dice_that_nobody_reached_is_said():
    assert "No trial reached Dice 0.9." in headline(replace(SUMMARY, wanted_dice=0.9))
    assert "smallest epsilon among those that reach Dice 0.6" in headline(replace(SUMMARY, wanted_dice=0.6))


def test_hole_an_infinite_account_is_never_shown_as_a_number():
    facts = {"north": 7.123, "south": math.inf}
    html = render_search_report(replace(SUMMARY, accounting="compose", worst_case=facts))
    assert "<dt>Worst case, south</dt><dd>epsilon infinite (unprotected)</dd>" in html
    tile = html[html.index("Worst case of the search") :][:200]
    assert "infinite (unprotected)" in tile
    assert "checked before it began" not in tile  # no budget was: none bounds what is infinite
