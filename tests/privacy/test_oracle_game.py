"""No adversary tells two neighbouring private data sets apart by anything but charged updates; see oracle_game.py.

Seeds are fixed. The 99.6 % interval of each of the 13 rates of right guesses, 95 % for all of them together, contains a
half. `benchmarks/privacy_game.py` plays the whole game, too, and keeps its rates.
"""

import os
from contextlib import nullcontext

import pytest
from oracle_game import ADVERSARIES, KINDS, failing_scores, play, time_of_description, winners

from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes
from medfl_ray.federation.hospital_rules.site_evaluation import suppressed_scores
from medfl_ray.messages import ClientFailure

SEED = 20261201
NUM_PAIRS = 400
SAMPLE = 16


def played(folder, seeds):
    return [play(folder / str(seed), seed) for seed in seeds]


def test_thirteen_adversaries_play():
    assert len(ADVERSARIES) + 1 == 13


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_hole_no_adversary_wins_a_sample_of_the_game(tmp_path):
    first = SEED + SAMPLE * (int(os.environ.get("MEDFL_SAMPLE", "0")) % (NUM_PAIRS // SAMPLE))
    assert winners(played(tmp_path, range(first, first + SAMPLE)), SEED) == {}


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_hole_no_adversary_wins_the_whole_game(tmp_path):
    assert winners(played(tmp_path, range(SEED, SEED + NUM_PAIRS)), SEED) == {}


@pytest.mark.ci
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("hole", "adversary"), [("times", time_of_description), ("failures", failing_scores)])
def test_where_a_hole_is_open_an_adversary_sees_who_is_in(tmp_path, monkeypatch, hole, adversary):
    if hole == "times":
        monkeypatch.setattr(AnswerTimes, "padded", lambda self, kind, step_s: nullcontext())
    else:
        monkeypatch.setattr("medfl_ray.federation.hospital.suppressed_scores", _fails_of_the_patient)
    usable = [seed for seed in range(64) if KINDS[seed % len(KINDS)] in ("ordinary", "bright", "doubled")]
    games = played(tmp_path, usable[:6])
    assert {game.is_in for game in games} == {True, False}
    place = ADVERSARIES.index(adversary)
    assert [game.signs[place] > 0 for game in games] == [game.is_in for game in games]


def _fails_of_the_patient(parts, round, weights, is_last, score):
    """Answer with a failure where the one patient is among those who were read, as some fault might."""
    if any(case.patient_id == "p999" for case in (*parts.data.train, *parts.data.holdout)):
        return ClientFailure(hospital="a", round=round, attempt=0, stage="evaluate", reason="it failed")
    return suppressed_scores(parts, round, weights, is_last, score)
