"""What Ray Tune asks: every suggestion is written down first, unfinished trials come first, the front is spared."""

import pytest
from ray.tune.schedulers import TrialScheduler
from search_cases import search_of

from medfl_ray.errors import StorageError
from tune.journal import JOURNAL, Journal, Result, Trial
from tune.searcher import FrontMedian, JournaledSearch, build_scheduler, known_study


def result(dice=0.5, epsilon=4.0, rounds=3):
    return Result(epsilon=epsilon, dice=dice, low=dice, high=dice, size_bytes=1e6, rounds=rounds, spent=epsilon)


def test_a_trial_is_in_the_journal_before_it_starts(tmp_path):
    searcher = JournaledSearch(search_of(tmp_path), tmp_path, 3)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert (first["number"], second["number"]) == (0, 1)
    assert [(t.number, t.state) for t in Journal(tmp_path).trials()] == [(0, "started"), (1, "started")]
    assert 2 <= first["noise_multiplier"] <= 6


def test_what_was_under_way_is_continued_and_what_has_ended_is_not_drawn_again(tmp_path):
    search = search_of(tmp_path)
    before = JournaledSearch(search, tmp_path, 3)
    drawn = [before.suggest(name) for name in "abc"]
    before.on_trial_complete("b", result(rounds=1).model_dump())
    after = JournaledSearch(search, tmp_path, 3)
    assert [after.suggest(name) for name in "xy"] == [drawn[0], drawn[2]]
    fresh = after.suggest("z")
    assert fresh["number"] == 3
    assert fresh["noise_multiplier"] not in [trial["noise_multiplier"] for trial in drawn]
    study = known_study(search, Journal(tmp_path).trials())
    assert [trial.values for trial in study.trials] == [[4.0, 0.5, 1e6]]


def test_how_a_trial_ended_is_written_down(tmp_path):
    told = []
    searcher = JournaledSearch(search_of(tmp_path), tmp_path, 3, told.append)
    numbers = [searcher.suggest(name)["number"] for name in "abc"]
    folder = tmp_path / "trials" / "000"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(result(dice=0.7).model_dump_json())
    searcher.on_trial_complete("a", result(rounds=2).model_dump())
    searcher.on_trial_complete("b", result(rounds=1).model_dump())
    searcher.on_trial_complete("c", None, error=True)
    trials = Journal(tmp_path).trials()
    assert numbers == [0, 1, 2]
    assert [trial.state for trial in trials] == ["finished", "stopped", "failed"] == [trial.state for trial in told]
    assert trials[0].result.dice == 0.7
    assert "after round 1 of 3" in trials[1].reason


def test_a_torn_last_line_is_passed_over_and_damage_in_the_middle_is_not(tmp_path):
    journal = Journal(tmp_path)
    journal.append(Trial(number=0, state="started", parameters={"noise_multiplier": 2.0}))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"number": 1, "sta')
    assert [trial.number for trial in journal.trials()] == [0]
    journal.append(Trial(number=1, state="started", parameters={"noise_multiplier": 3.0}))
    assert [trial.number for trial in journal.trials()] == [0, 1]
    (tmp_path / JOURNAL).write_text("no line\n" + (tmp_path / JOURNAL).read_text())
    with pytest.raises(StorageError, match="line 1"):
        journal.trials()


class Running:
    """A trial as a scheduler sees it."""

    def __init__(self, name):
        self.trial_id = name


def reports(scheduler, rows):
    """Let trials report at round 2 and return what the rule says to the last one."""
    action = None
    for name, epsilon, dice in rows:
        trial = Running(name)
        scheduler.on_trial_add(None, trial)
        told = {**result(dice, epsilon, rounds=2).model_dump(), "training_iteration": 2}
        action = scheduler.on_trial_result(None, trial, told)
    return action


GOOD = [("a", 8.0, 0.8), ("b", 8.0, 0.7), ("c", 8.0, 0.75), ("d", 8.0, 0.72)]


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_trial_that_others_beat_is_stopped_and_one_on_the_front_is_not(tmp_path, rule):
    search = search_of(tmp_path, stopping=rule, grace_rounds=2)
    beaten = reports(build_scheduler(search, 8), [*GOOD, ("e", 9.0, 0.1)])
    spared = reports(build_scheduler(search, 8), [*GOOD, ("e", 1.0, 0.1)])
    assert (beaten, spared) == (TrialScheduler.STOP, TrialScheduler.CONTINUE)


def test_a_spared_trial_can_still_be_stopped_later(tmp_path):
    scheduler = build_scheduler(search_of(tmp_path, stopping="median", grace_rounds=1), 8)
    assert isinstance(scheduler, FrontMedian)
    reports(scheduler, GOOD)
    late = Running("e")
    scheduler.on_trial_add(None, late)
    told = {**result(0.1, 1.0, rounds=2).model_dump(), "training_iteration": 2}
    assert scheduler.on_trial_result(None, late, told) == TrialScheduler.CONTINUE
    cheap = Running("f")
    scheduler.on_trial_add(None, cheap)
    scheduler.on_trial_result(None, cheap, {**result(0.3, 0.9, rounds=2).model_dump(), "training_iteration": 2})
    again = {**result(0.1, 1.0, rounds=3).model_dump(), "training_iteration": 3}
    assert scheduler.on_trial_result(None, late, again) in (TrialScheduler.STOP, TrialScheduler.CONTINUE)
