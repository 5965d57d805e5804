"""Rows of a damaged ledger that only its indices still name: which mirrored history may stand for them."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.errors import LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charged_segments
from medfl_ray.store.ledger.recovery import _lost_rows, _readable_rows, recover

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)


def opened(folder: Path, data_set: str = "scans") -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", data_set, DELTA, None)


def train(ledger: PrivacyLedger, rounds: range, job: str = "study") -> None:
    for number in rounds:
        ledger.settle(ledger.reserve(job, number, 0, MECHANISM, None))


def steps(ledger: PrivacyLedger) -> int:
    return sum(segment.num_steps for segment in charged_segments(ledger.events()))


def checkpointed(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def without_last_rows(path: Path, *also: bytes) -> int:
    """Overwrite the last page of the table, and every page that holds one of some words; return the rows that stay."""
    rows, _ = _readable_rows(checkpointed(path))
    with closing(sqlite3.connect(path)) as connection:
        (last,) = connection.execute("SELECT signature FROM ledger_events ORDER BY id DESC LIMIT 1").fetchone()
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        if any(word in content[page : page + 4096] for word in (last.encode(), *also)):
            content[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    left, num_lost = _readable_rows(path)
    assert num_lost == len(rows) - len(left) > 0
    return len(left)


def split(tmp_path: Path, num_shared: int) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A ledger of which a backup went on with another coordinator; both mirrors."""
    site, backup = tmp_path / "split", tmp_path / "kept"
    site.mkdir()
    train(opened(site), range(1, num_shared + 1), job="first")
    shutil.copytree(site, backup)
    train(opened(site), range(num_shared + 1, num_shared + 7), job="first")
    first = opened(site).export()
    train(opened(backup), range(1, 7), job="second")
    return backup, first, opened(backup).export()


def test_hole_the_lost_end_of_a_restored_backup_is_not_explained_by_the_history_it_replaced(tmp_path: Path) -> None:
    backup, first, second = split(tmp_path, 2)
    path = backup / "ledger.sqlite"
    num_left = without_last_rows(path)
    assert 4 < num_left < 16  # some rows of the second job can be read, and some cannot
    content = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"{16 - num_left} rows of the damaged ledger .* of all coordinators"):
        recover(path, [first], DELTA)
    assert path.read_bytes() == content
    assert not list(backup.glob("damaged-*"))
    recover(path, [first, second], DELTA)
    assert steps(opened(backup)) == 2 * (2 + 6 + 6)


def test_hole_a_mirror_that_splits_exactly_where_the_readable_rows_end_is_told_by_its_reservations(
    tmp_path: Path,
) -> None:
    """Only rows that both histories hold can be read."""
    backup, first, second = split(tmp_path, 5)
    path = backup / "ledger.sqlite"
    signatures = [row["signature"].encode() for row in second["events"][10:]]
    assert without_last_rows(path, *signatures) <= 10
    with pytest.raises(LedgerError, match="what the others charged is unknown"):
        recover(path, [first], DELTA)
    recover(path, [first, second], DELTA)
    assert steps(opened(backup)) == 2 * (5 + 6 + 6)


def test_hole_rows_behind_the_first_disagreement_explain_nothing_without_the_indices(tmp_path: Path) -> None:
    backup, first, second = split(tmp_path, 2)
    path = backup / "ledger.sqlite"
    (reservation,) = {row["reservation"] for row in second["events"][-2:]} - {None}
    without_last_rows(path, reservation.encode())
    assert {row.reservation for row in _lost_rows(path)} == {None}
    with pytest.raises(LedgerError, match="what the others charged is unknown"):
        recover(path, [first], DELTA)
    recover(path, [second], DELTA)
    assert steps(opened(backup)) == 2 * (2 + 6)


def test_hole_lost_rows_of_one_data_set_are_not_explained_by_the_mirror_of_another(tmp_path: Path) -> None:
    """The mirror of `scans` goes on behind the backup; what is lost belongs to `tiles`."""
    site, backup = tmp_path / "two", tmp_path / "kept"
    site.mkdir()
    train(opened(site), range(1, 3))
    train(opened(site, "tiles"), range(1, 3))
    early = opened(site, "tiles").export()
    shutil.copytree(site, backup)
    train(opened(site), range(3, 20))
    ahead = opened(site).export()
    train(opened(backup, "tiles"), range(3, 9))
    late = opened(backup, "tiles").export()
    path = backup / "ledger.sqlite"
    without_last_rows(path)
    with pytest.raises(LedgerError, match="what the others charged is unknown"):
        recover(path, [ahead, early], DELTA)
    recover(path, [ahead, late], DELTA)
    assert (steps(opened(backup)), steps(opened(backup, "tiles"))) == (2 * 19, 2 * 8)
