"""Checkpoints: whole or not there; the last good one is always found."""

import errno
import os
import stat
from dataclasses import replace

import numpy as np
import pytest

from medfl_ray.errors import StorageError
from medfl_ray.messages import ClientFailure, Metric, Receipt, RoundResult
from medfl_ray.store import durable
from medfl_ray.store.run.checkpoints import Checkpoint, last_good_checkpoint, load_checkpoint, save_checkpoint


def checkpoint(round: int, dice: float | None = None) -> Checkpoint:
    receipt = Receipt(
        job="j", round=round, attempt=1, plan_hash="p", config_hash="c", asked=("a",), trained=("a",), failures=(),
        update_hashes={"a": "x"}, spent={}, weights_before="b", weights_after="w", published=True,
        ended_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    metrics = {"a": {"dice": Metric(value=dice, label="public")}} if dice is not None else {}
    result = RoundResult(round=round, receipt=receipt, metrics=metrics, duration_s=1.0)
    weights = np.arange(5, dtype=np.float32) + round
    return Checkpoint(round, weights, {"momentum": weights * 2}, result)


def test_round_trip_and_retention(tmp_path):
    for number in range(1, 6):
        save_checkpoint(tmp_path, checkpoint(number), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-00003", "round-00004", "round-00005"]
    found, problems = last_good_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, problems) == (5, [])
    assert found.weights.tolist() == [5, 6, 7, 8, 9]
    assert found.server_state["momentum"].tolist() == [10, 12, 14, 16, 18]
    assert found.result == checkpoint(5).result


def kept(folder):
    return [int(path.name[-5:]) for path in sorted(folder.glob("round-*"))]


@pytest.mark.parametrize("known", [None, {}], ids=["read again", "remembered"])
def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path, known):
    for number, dice in enumerate([0.3, 0.9, 0.5, 0.4, 0.6, float("nan")], start=1):
        save_checkpoint(tmp_path, checkpoint(number, dice), keep=2, scores=known)
    assert kept(tmp_path) == [2, 5, 6]
    if known is not None:  # nothing of what is gone is remembered
        assert sorted(path.name for path in known) == ["round-00002", "round-00005", "round-00006"]
    save_checkpoint(tmp_path, checkpoint(7, 0.95), keep=2, scores=known)
    assert kept(tmp_path) == [6, 7]


def test_a_process_that_goes_on_reads_the_scores_that_it_does_not_know(tmp_path):
    for number, dice in enumerate([0.3, 0.9, 0.5], start=1):
        save_checkpoint(tmp_path, checkpoint(number, dice), keep=2)
    save_checkpoint(tmp_path, checkpoint(4, 0.6), keep=2, scores={})
    assert kept(tmp_path) == [2, 3, 4]


def test_a_score_of_fewer_hospitals_is_not_the_best(tmp_path):
    absent = ClientFailure(
        hospital="b", round=2, attempt=1, stage="evaluate", reason="not in time", may_have_left=False
    )
    save_checkpoint(tmp_path, checkpoint(1, 0.7), keep=1)
    partly = checkpoint(2, 0.9)
    receipt = partly.result.receipt.model_copy(update={"failures": (absent,)})
    save_checkpoint(tmp_path, replace(partly, result=partly.result.model_copy(update={"receipt": receipt})), keep=1)
    save_checkpoint(tmp_path, checkpoint(3, 0.5), keep=1)
    assert kept(tmp_path) == [1, 3]


def test_a_round_trained_again_replaces_its_damaged_checkpoint(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=3)
    (tmp_path / "round-00001" / "state.json").write_bytes(b"{")
    save_checkpoint(tmp_path, checkpoint(1), keep=3)
    assert load_checkpoint(tmp_path / "round-00001").round == 1
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001"]


@pytest.mark.parametrize("step", ["begin", "written", "manifest", "renamed", "pruned"])
def test_a_disk_that_fills_at_any_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    monkeypatch.setenv("MEDFL_FAILPOINT", f"checkpoint.{step}:1:enospc")
    with pytest.raises(StorageError, match=r"round 2.*No space left on device.*--resume"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    monkeypatch.delenv("MEDFL_FAILPOINT")
    found, problems = last_good_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, problems) == (2 if step in ("renamed", "pruned") else 1, [])
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    assert kept(tmp_path) == [3]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, name, damage):
    for number in (1, 2):
        save_checkpoint(tmp_path, checkpoint(number), keep=3)
    victim = tmp_path / "round-00002" / name
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    with pytest.raises(StorageError):
        load_checkpoint(tmp_path / "round-00002")
    found, problems = last_good_checkpoint(tmp_path)
    assert found is not None
    assert found.round == 1
    assert "round-00002" in problems[0]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1), keep=3)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_checkpoint(tmp_path, checkpoint(2), keep=3)
    monkeypatch.undo()
    found, problems = last_good_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, problems) == (1, [])
    save_checkpoint(tmp_path, checkpoint(2), keep=3)
    assert load_checkpoint(tmp_path / "round-00002").round == 2


def test_append_removes_a_torn_line_first(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a": ')
    durable.append_line(path, '{"a": 2}')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a": 2}']
    path.write_bytes(b'{"a": ')
    durable.append_line(path, '{"a": 3}')
    assert path.read_text() == '{"a": 3}\n'


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "state", []
    path.write_bytes(b"old")
    flush = os.fsync

    def note(descriptor):
        flush(descriptor)
        found = os.fstat(descriptor)
        synced.append((found.st_ino, None if stat.S_ISDIR(found.st_mode) else found.st_size, path.read_bytes()))

    monkeypatch.setattr(durable.os, "fsync", note)
    durable.replace_file(path, b"the new one")
    # All of the new file is flushed while the old one still has the name, and then the folder in which it changed.
    assert synced == [(path.stat().st_ino, 11, b"old"), (tmp_path.stat().st_ino, None, b"the new one")]
