"""medfl-ray tune and what privacy plan makes of its results, as a user calls them."""

import pytest
from search_cases import EPSILONS, search_of, write_search

from tune.journal import Journal, Result, Trial
from tune.search import create_search


@pytest.fixture
def folder(tmp_path):
    """A search of which two trials have finished."""
    search = create_search(search_of(tmp_path, space=EPSILONS))
    for number, (epsilon, dice) in enumerate([(2.0, 0.4), (8.0, 0.8)]):
        result = Result(epsilon=epsilon, dice=dice, low=dice, high=dice, size_bytes=1e5, rounds=3, spent=epsilon)
        point = {"epsilon": epsilon, "learning_rate": 0.05}
        Journal(search.folder).append(Trial(number=number, state="finished", parameters=point, result=result))
    return search.folder


@pytest.mark.parametrize(
    ("dice", "words"),
    [
        (0.6, "for Dice >= 0.6 you need epsilon about 4.00 (unit patient, delta 1e-05, adjacency add/remove)"),
        (0.3, "you need epsilon at most 2.00"),
        (0.9, "no trial is enough: the best one, 1, reached 0.800 at epsilon 8.00"),
    ],
)
def test_a_plan_says_what_epsilon_a_dice_needs(medfl, folder, dice, words):
    answer = medfl("privacy", "plan", "--search", str(folder), "--dice", str(dice))
    assert answer.code == 0
    assert words in answer.out
    assert "by 2 finished trials on synthetic held-out patients" in answer.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dice", "0.5"], "belong together"),
        (["--search", "{folder}", "--dice", "0.5", "--epsilon", "3"], "stand alone"),
        (["--search", "{folder}", "--dice", "1.5"], "at most 1"),
        (["--search", "nowhere", "--dice", "0.5"], "not the folder of a search"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(medfl, folder, options, words):
    answer = medfl("privacy", "plan", *[option.format(folder=folder) for option in options])
    assert answer.code == 2
    assert words in answer.err


def test_a_search_needs_a_file_or_a_folder_and_a_resumed_one_keeps_its_configuration(medfl, folder, tmp_path):
    for arguments, words in (
        ([], "give either the YAML file"),
        (["--resume", str(folder), "--trials", "3"], "keeps its configuration"),
        ([str(tmp_path / "absent.yaml")], "no configuration file"),
        ([str(write_search(tmp_path)), "--set", "sampler=grid"], "sampler"),
    ):
        answer = medfl("tune", *arguments)
        assert (answer.code, words in answer.err) == (2, True), answer
