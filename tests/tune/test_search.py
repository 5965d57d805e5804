"""A whole search on Ray, killed half-way and resumed; and what a search of the best trial alone leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from search_cases import EPSILONS, search_of, write_search

from medfl_ray.config.files import load_run_config
from medfl_ray.errors import ConfigError
from medfl_ray.store.run.receipts import read_receipts
from tune.journal import Journal, Result, Trial
from tune.search import (
    Outcome,
    create_search,
    draw_num_trials,
    forget_all_but_best,
    negative_binomial_parameter,
    open_search,
    recommend,
    write_recommendation,
)
from tune.space import NumTrials

ROOT = Path(__file__).parents[2]
CODE = "from medfl_ray.cli.main import main; main()"


def start(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEDFL_STATE_DIR": str(folder / "state")}
    command = [sys.executable, "-c", CODE, "tune", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def ended(folder):
    return {trial.number: trial for trial in Journal(folder).trials() if trial.ended}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_search_that_is_killed_half_way_resumes_without_repeating_a_trial(tmp_path):
    config = write_search(tmp_path, trials=5, max_concurrent=2)
    victim = start([config], tmp_path)
    try:
        while victim.poll() is None:
            folders = list((tmp_path / "out").glob("*/search.yaml"))
            if folders and len(ended(folders[0].parent)) >= 2:
                break
            time.sleep(0.05)
        assert victim.poll() is None, victim.stdout.read().decode()
    finally:
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
    folder = folders[0].parent
    before = ended(folder)
    assert 2 <= len(before) < 5
    kept = {number: (folder / "trials" / f"{number:03d}" / "metrics.jsonl").read_bytes() for number in before}
    resumed = start(["--resume", folder], tmp_path)
    said, _ = resumed.communicate()
    assert resumed.returncode == 0, said.decode()
    after = ended(folder)
    assert sorted(after) == [0, 1, 2, 3, 4]
    assert {number: after[number] for number in before} == before
    for number, metrics in kept.items():
        assert (folder / "trials" / f"{number:03d}" / "metrics.jsonl").read_bytes() == metrics
    ends = Counter(line.number for line in Journal(folder).lines() if line.ended)
    assert set(ends.values()) == {1}
    for number in after:
        receipts, _ = read_receipts(folder / "trials" / f"{number:03d}" / "receipts.jsonl")
        assert [receipt.round for receipt in receipts if receipt.published] == [1, 2, 3]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "The front: privacy, Dice and traffic" in report
    assert "5 of 5 trials finished" in report
    assert load_run_config(folder / "recommended.yaml").name == "small"


def finish(search, scores):
    """Write the journal that trials with these (epsilon, Dice) would leave."""
    journal = Journal(search.folder)
    for number, (epsilon, dice) in enumerate(scores):
        result = Result(epsilon=epsilon, dice=dice, low=dice, high=dice, size_bytes=1e5, rounds=3, spent=epsilon)
        point = {"epsilon": epsilon, "learning_rate": 0.05}
        journal.append(Trial(number=number, state="finished", parameters=point, result=result))
        (search.journal.trial_folder(number)).mkdir(parents=True)
    trials = journal.trials()
    return Outcome(search, trials, recommend(search.plan.search, trials), True)


def test_the_recommendation_is_the_final_run_with_the_trials_parameters(tmp_path):
    search = create_search(search_of(tmp_path, space=EPSILONS, wanted_dice=0.6))
    outcome = finish(search, [(8.0, 0.8), (4.0, 0.65), (2.0, 0.3)])
    run = load_run_config(write_recommendation(outcome))
    assert outcome.best.number == 1
    assert (run.privacy.epsilon, run.training.learning_rate, run.federation.pool) == (4.0, 0.05, "ray")


def test_a_search_is_opened_as_it_was_made(tmp_path):
    made = create_search(search_of(tmp_path))
    again = open_search(made.folder)
    assert again.plan.search.space == made.plan.search.space
    assert (again.num_trials, again.rounds) == (3, 3)
    assert str(tmp_path / "run.yaml") not in (made.folder / "search.yaml").read_text()
    with pytest.raises(ConfigError, match="not the folder of a search"):
        open_search(tmp_path / "out")


def test_a_search_of_the_best_alone_leaves_the_best_alone(tmp_path):
    select = {"accounting": "select", "num_trials": {"mean": 4}, "sampler": "random"}
    search = create_search(search_of(tmp_path, space=EPSILONS, **select))
    outcome = finish(search, [(8.0, 0.8), (4.0, 0.9), (2.0, 0.3)])
    assert outcome.best.number == 1
    forget_all_but_best(outcome)
    rows = [json.loads(line) for line in (search.folder / "trials.jsonl").read_text().splitlines()]
    assert [(row["number"], row["result"]["dice"]) for row in rows] == [(0, 0.9)]
    assert (search.folder / "best").is_dir()
    assert not (search.folder / "trials").exists()
    assert (search.folder / "num_trials").read_text() == "1"


def test_the_secret_number_of_trials_has_the_mean_that_is_accounted():
    drawn = [draw_num_trials(NumTrials(mean=4, shape=0.5)) for _ in range(400)]
    assert min(drawn) >= 1
    assert np.mean(drawn) == pytest.approx(4, abs=1.5)
    assert negative_binomial_parameter(4.0, 1.0) == pytest.approx(0.25)  # the geometric distribution
    assert draw_num_trials(NumTrials(mean=1)) == 1
