"""Forty faults planted over the whole code: the ordinary tests must catch each of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from planted.faults import FAULTS, ROOMS, Fault
from planted.plant import ROOT, Misplaced, Outcome, copy_tree, file_of, nodes_of, plant, run_tests


def test_the_faults_lie_in_every_room():
    assert len(FAULTS) == len({fault.name for fault in FAULTS}) == 40
    assert {fault.room for fault in FAULTS} == set(ROOMS)
    assert min(Counter(fault.room for fault in FAULTS).values()) >= 2


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_faults_text_and_its_tests_are_each_in_one_place(fault):
    file_of(fault, ROOT)
    assert len(nodes_of(fault.tests, ROOT)) == len(fault.tests) > 0
    assert fault.old != fault.new


def test_a_text_that_is_not_there_once_is_named():
    gone = Fault("gone", "data", "this text is " + "nowhere in the code", "x", ("test_nowhere",))
    with pytest.raises(Misplaced, match="'gone': its text is in no file"):
        file_of(gone, ROOT)
    with pytest.raises(Misplaced, match="the test test_nowhere is in 0 files"):
        nodes_of(gone.tests, ROOT)


def test_a_fault_is_caught_by_all_its_tests_and_by_what_they_check():
    fault = Fault("f", "data", "a", "b", ("test_a", "test_b"))
    both = {"tests/x.py::test_a[1-2]": "assert 1 == 2", "tests/x.py::test_b": "DataError: no"}
    assert Outcome(fault, "x.py", both, 1.0).is_caught
    assert not Outcome(fault, "x.py", {"tests/x.py::test_a": "assert 1 == 2"}, 1.0).is_caught
    assert not Outcome(fault, "x.py", {**both, "tests/x.py::test_b": "NameError: name 'q'"}, 1.0).is_caught


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_without_a_fault_every_test_passes(tmp_path: Path):
    copy_tree(tmp_path)
    names = sorted({test for fault in FAULTS for test in fault.tests})
    assert run_tests(tmp_path, nodes_of(names, tmp_path)) == {}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(tmp_path: Path, fault: Fault):
    outcome = plant(fault, tmp_path / "tree")
    assert outcome.is_caught, outcome.failed
