"""A hospital's memory: the round before, whatever happened in between, and no more files than a resume can need."""

import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.errors import StorageError
from medfl_ray.store.run.hospital_memory import HospitalMemory


def knows(value):
    return {"control": np.full(3, value, dtype=np.float32)}


def value_before(memory, round):
    found = memory.before(round)
    return float(found["control"][0]) if found else None


def test_a_round_starts_from_the_newest_of_an_earlier_one(tmp_path):
    memory = HospitalMemory(tmp_path, "job", keep=3)
    assert memory.before(1) == {}
    memory.save(1, knows(1))
    memory.save(3, knows(3))
    assert [value_before(memory, round) for round in (1, 2, 3, 4, 9)] == [None, 1, 1, 3, 3]
    memory.save(3, knows(33))  # repeated
    assert value_before(memory, 4) == 33


def test_a_round_that_is_planned_anew_finds_nothing_of_its_first_attempt(tmp_path):
    memory = HospitalMemory(tmp_path, "job", keep=3)
    for round in (1, 2, 3):
        memory.save(round, knows(round))
    memory.forget_from(2)
    assert [value_before(memory, round) for round in (2, 3, 4)] == [1, 1, 1]


def test_two_runs_do_not_mix_and_nobody_else_may_read(tmp_path):
    HospitalMemory(tmp_path, "one", keep=3).save(1, knows(1))
    assert HospitalMemory(tmp_path, "two", keep=3).before(2) == {}
    assert value_before(HospitalMemory(tmp_path, "one", keep=3), 2) == 1
    assert stat.S_IMODE((tmp_path / "memory" / "one").stat().st_mode) == 0o700


@given(rounds=st.sets(st.integers(1, 30), min_size=1), keep=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_what_any_checkpoint_needs_is_there(tmp_path_factory, rounds, keep):
    """After a round that was trained, a run may go on from any of the `keep` checkpoints before it."""
    memory = HospitalMemory(tmp_path_factory.mktemp("memory"), "job", keep)
    done = []
    for number in sorted(rounds):
        memory.save(number, knows(number))
        done.append(number)
        for repeated in range(max(1, number - keep + 1), number + 2):
            expected = max((one for one in done if one < repeated), default=None)
            assert value_before(memory, repeated) == expected
        assert len(list(memory._folder.iterdir())) <= keep + 1


def test_a_run_that_is_set_back_forgets_what_came_after(tmp_path):
    memory = HospitalMemory(tmp_path, "job", keep=3)
    for number in (1, 2, 3):
        memory.save(number, knows(number))
    memory.save(2, knows(22))
    assert value_before(memory, 4) == 22


def test_a_damaged_file_is_one_sentence(tmp_path):
    memory = HospitalMemory(tmp_path, "job", keep=3)
    memory.save(2, knows(1))
    (memory._folder / "round-00002.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match="memory of round 2 cannot be read") as caught:
        memory.before(3)
    assert str(tmp_path) not in str(caught.value)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    memory = HospitalMemory(tmp_path, "job", keep=3)
    memory.save(1, knows(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot write"):
        memory.save(2, knows(2))
    assert value_before(memory, 3) == 1
