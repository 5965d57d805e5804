"""The folder of an older version's search still lists its trials, reports and goes on."""

import json
import shutil
from pathlib import Path

import pytest

from tune.journal import Journal
from tune.report import write_report
from tune.search import Outcome, open_results, open_search, recommend, run_search

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2026_12"


@pytest.fixture
def search(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "search", tmp_path / "search")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "search"


def test_its_trials_are_listed_and_reported(search):
    lines = [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]
    trials = Journal(search).trials()
    assert [trial.number for trial in trials] == [0, 1]
    assert all(trial.ended and trial.result is not None for trial in trials)
    assert {trial.result.dice for trial in trials} == {line["result"]["dice"] for line in lines if line.get("result")}
    opened = open_results(search)
    best = recommend(opened.plan.search, trials)
    page = write_report(Outcome(opened, trials, best, completed=True)).read_text()
    assert "noise_multiplier" in page


@pytest.mark.ci
def test_it_goes_on_where_one_more_trial_is_asked_for(search, ray_cluster):
    file = search / "search.yaml"
    assert "trials: 2\n" in file.read_text()
    file.write_text(file.read_text().replace("trials: 2\n", "trials: 3\n"))
    before = Journal(search).trials()
    outcome = run_search(open_search(search), 2)
    assert outcome.completed
    assert [trial.number for trial in outcome.trials] == [0, 1, 2]
    assert outcome.trials[:2] == before
