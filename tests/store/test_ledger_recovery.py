"""Truncation, deletion, an old backup, a new node: nothing trains until the mirror is charged."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.cli.privacy_ledger import recover as recover_command
from medfl_ray.errors import LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charged_segments, genesis
from medfl_ray.store.ledger.export import verify_export
from medfl_ray.store.ledger.file import KEY_NAME, LedgerFile
from medfl_ray.store.ledger.recovery import _readable_rows, recover
from medfl_ray.store.signing_key import load_key

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
ACCOUNT = ("north", "scans")


def opened(folder: Path, data_set: str = "scans", expected: Any = None) -> PrivacyLedger:
    heads = () if expected is None else (expected,)
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", data_set, DELTA, None, heads)


def train(ledger: PrivacyLedger, rounds: range, job: str = "study") -> None:
    for number in rounds:
        ledger.settle(ledger.reserve(job, number, 0, MECHANISM, None))


def steps(ledger: PrivacyLedger) -> int:
    return sum(segment.num_steps for segment in charged_segments(ledger.events()))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A hospital that trained four rounds, with the state it had after two kept as a backup."""
    site = tmp_path / "site"
    site.mkdir()
    train(opened(site), range(1, 3))
    shutil.copytree(site, tmp_path / "backup")
    train(opened(site), range(3, 5))
    return site


@pytest.fixture
def mirrored(site: Path) -> dict[str, Any]:
    return opened(site).export()


def forget(site: Path, key_too: bool = False) -> None:
    for path in site.iterdir():
        if key_too or path.name != KEY_NAME:
            path.unlink()


def head(mirrored: dict[str, Any]) -> Any:
    return verify_export(mirrored)


def test_an_old_backup_is_refused_and_brought_up_to_date(tmp_path: Path, site: Path, mirrored: dict[str, Any]) -> None:
    forget(site, key_too=True)
    shutil.copytree(tmp_path / "backup", site, dirs_exist_ok=True)
    with pytest.raises(LedgerError, match="end is missing"):
        opened(site, expected=head(mirrored))
    assert recover(site / "ledger.sqlite", [mirrored], DELTA) == {ACCOUNT: 4}
    assert opened(site, expected=head(mirrored)).export() == mirrored


def test_a_truncated_chain_is_refused_and_completed(site: Path, mirrored: dict[str, Any]) -> None:
    connection = sqlite3.connect(site / "ledger.sqlite")
    connection.execute("DROP TRIGGER ledger_events_no_delete")
    connection.execute("DELETE FROM ledger_events WHERE sequence > 5")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="end is missing"):
        opened(site, expected=head(mirrored))
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert steps(opened(site, expected=head(mirrored))) == 8


def test_a_deleted_ledger_is_refused_and_restored(site: Path, mirrored: dict[str, Any]) -> None:
    forget(site)
    with pytest.raises(LedgerError, match="is gone"):
        opened(site, expected=head(mirrored))
    assert recover(site / "ledger.sqlite", [mirrored], DELTA) == {ACCOUNT: 8}
    assert opened(site, expected=head(mirrored)).export() == mirrored


def test_a_new_node_without_ledger_and_key_is_refused_and_charged(site: Path, mirrored: dict[str, Any]) -> None:
    forget(site, key_too=True)
    with pytest.raises(LedgerError, match="has 0 rows and is known to have had 8"):
        opened(site, expected=head(mirrored))
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    ledger = opened(site, expected=head(mirrored))
    assert ledger.spent().epsilon == mirrored["spent"]["epsilon"]
    assert load_key(site / KEY_NAME).public_key != mirrored["public_key"]


def test_another_history_keeps_its_charges_and_gets_the_mirrors(
    tmp_path: Path, site: Path, mirrored: dict[str, Any]
) -> None:
    forget(site, key_too=True)
    shutil.copytree(tmp_path / "backup", site, dirs_exist_ok=True)
    train(opened(site), range(3, 6), job="other")  # trained on without asking the mirror
    with pytest.raises(LedgerError, match="another history"):
        opened(site, expected=head(mirrored))
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    ledger = opened(site, expected=head(mirrored))
    assert steps(ledger) == 2 * (2 + 3 + 2)
    again = recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert again == {ACCOUNT: 0}  # what was charged once is not charged again
    train(ledger, range(9, 10))
    ledger.verify()


def test_a_release_after_an_old_backup_does_not_undo_what_the_mirror_saw(tmp_path: Path) -> None:
    site, backup = tmp_path / "site", tmp_path / "backup"
    site.mkdir()
    reservation = opened(site).reserve("study", 1, 0, MECHANISM, None)
    shutil.copytree(site, backup)
    opened(site).settle(reservation)
    mirrored = opened(site).export()
    opened(backup).release(reservation, "pretended never to have trained")
    recover(backup / "ledger.sqlite", [mirrored], DELTA)
    assert steps(opened(backup, expected=head(mirrored))) == 2


def test_a_ledger_ahead_of_its_mirror_is_left_alone(site: Path, mirrored: dict[str, Any]) -> None:
    train(opened(site), range(7, 8))
    before = opened(site).export()
    assert recover(site / "ledger.sqlite", [mirrored], DELTA) == {ACCOUNT: 0}
    assert opened(site).export() == before


def test_a_bad_row_is_set_aside_and_credible_rows_behind_the_mirror_are_charged(
    site: Path, mirrored: dict[str, Any]
) -> None:
    train(opened(site), range(5, 6))
    connection = sqlite3.connect(site / "ledger.sqlite")
    connection.execute("DROP TRIGGER ledger_events_no_update")
    connection.execute("UPDATE ledger_events SET num_steps = 1 WHERE sequence = 3")
    connection.commit()
    connection.close()
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert steps(opened(site, expected=head(mirrored))) == 10
    assert list(site.glob("damaged-*-ledger.sqlite"))


def checkpointed(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def without_header(content: bytes) -> bytes:
    return b"\0" * 16 + content[16:]


def without_first_page(content: bytes) -> bytes:
    return b"\xff" * 4096 + content[4096:]


def without_schema(content: bytes) -> bytes:
    """Leave a valid header before a first page that names no table."""
    return content[:100] + b"\x0d\0\0\0\0\x10\0\0" + b"\0" * (4096 - 108) + content[4096:]


def without_table_and_indices(content: bytes) -> bytes:
    return content[:4096] + b"\xff" * (len(content) - 4096)


def junk(content: bytes) -> bytes:
    return b"junk" * 1000


BEYOND_COUNTING = [without_header, without_first_page, without_schema, without_table_and_indices, junk]


@pytest.mark.parametrize("destroy", BEYOND_COUNTING)
def test_hole_a_file_whose_rows_cannot_be_counted_is_not_replaced_by_a_mirror(
    site: Path, destroy: Callable[[bytes], bytes]
) -> None:
    """The mirror has the first row alone: what followed, without protection too, must not be forgotten."""
    early = opened(site).export()
    train(opened(site), range(5, 30))
    opened(site).mark_unprotected("careless", "privacy.enable_dp is off")
    path = checkpointed(site / "ledger.sqlite")
    content = destroy(path.read_bytes())
    path.write_bytes(content)
    for mirrors in ([early], [early, early]):
        with pytest.raises(LedgerError, match=r"cannot be counted.*backup.*newest mirrors.*move ledger\.sqlite and"):
            recover(path, mirrors, DELTA)
    assert path.read_bytes() == content
    assert not list(site.glob("damaged-*"))


def test_hole_rows_that_were_not_yet_written_back_are_not_dropped_with_an_empty_file(
    site: Path, mirrored: dict[str, Any]
) -> None:
    forget(site)
    path, journal = site / "ledger.sqlite", site / "ledger.sqlite-wal"
    journal.write_bytes(b"frames")
    for prepare in (lambda: None, lambda: path.write_bytes(b"")):
        prepare()
        with pytest.raises(LedgerError, match="cannot be counted"):
            recover(path, [mirrored], DELTA)
    assert journal.read_bytes() == b"frames"


def test_hole_rows_at_the_end_of_the_table_are_counted_in_its_indices(site: Path) -> None:
    early = opened(site).export()
    train(opened(site), range(5, 40))
    late = opened(site).export()
    path = checkpointed(site / "ledger.sqlite")
    before = len(_readable_rows(path)[0])
    content = bytearray(path.read_bytes())
    (last,) = (page for page in range(0, len(content), 4096) if late["events"][-1]["signature"].encode() in
               content[page : page + 4096])  # fmt: skip
    content[last : last + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    rows, num_lost = _readable_rows(path)
    assert num_lost
    assert len(rows) + num_lost == before
    with pytest.raises(LedgerError, match="what the others charged is unknown"):
        recover(path, [early], DELTA)
    recover(path, [late], DELTA)
    assert steps(opened(site)) == 2 * 39


def test_hole_a_lost_row_is_explained_by_its_own_hash_and_not_by_another_row_of_a_mirror(
    tmp_path: Path, site: Path, mirrored: dict[str, Any]
) -> None:
    """An old backup went on otherwise: the mirror has as many rows as are lost, and yet other ones."""
    backup = tmp_path / "backup"
    train(opened(backup), range(3, 6), job="other")
    change(backup, "DELETE FROM ledger_events WHERE sequence = 5")
    with pytest.raises(LedgerError, match=r"1 rows of the damaged ledger .* stand in none of the mirrors"):
        recover(backup / "ledger.sqlite", [mirrored], DELTA)


def test_hole_an_altered_row_that_no_mirror_has_seen_is_not_forgotten(site: Path, mirrored: dict[str, Any]) -> None:
    train(opened(site), range(5, 6))
    late = opened(site).export()
    change(site, "UPDATE ledger_events SET num_steps = 1 WHERE sequence = 9")
    with pytest.raises(LedgerError, match=r"1 rows of the damaged ledger .* were altered"):
        recover(site / "ledger.sqlite", [mirrored], DELTA)
    recover(site / "ledger.sqlite", [late], DELTA)
    assert steps(opened(site)) == 10


def change(site: Path, statement: str) -> None:
    connection = sqlite3.connect(site / "ledger.sqlite")
    for verb in ("update", "delete"):
        connection.execute(f"DROP TRIGGER ledger_events_no_{verb}")
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_file_is_as_good_as_none(site: Path, mirrored: dict[str, Any], content: bytes | None) -> None:
    forget(site)
    if content is not None:
        (site / "ledger.sqlite").write_bytes(content)
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert opened(site).export() == mirrored


def test_a_lost_key_charges_every_readable_row(site: Path, mirrored: dict[str, Any]) -> None:
    train(opened(site), range(5, 7))
    (site / KEY_NAME).unlink()
    recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert steps(opened(site, expected=head(mirrored))) == 12


def test_several_mirrors_of_one_account_are_charged_once(tmp_path: Path, site: Path, mirrored: dict[str, Any]) -> None:
    short = opened(tmp_path / "backup").export()
    forget(site, key_too=True)
    recover(site / "ledger.sqlite", [short, mirrored, mirrored], DELTA)
    assert steps(opened(site, expected=head(mirrored))) == 8


def test_a_damaged_file_with_an_unmirrored_account_is_not_replaced(site: Path, mirrored: dict[str, Any]) -> None:
    opened(site, "tiles").reserve("study", 1, 0, MECHANISM, None)
    (site / KEY_NAME).unlink()
    with pytest.raises(LedgerError, match="of which no mirror was given: tiles"):
        recover(site / "ledger.sqlite", [mirrored], DELTA)
    assert (site / "ledger.sqlite").exists()


def test_a_forged_mirror_is_refused(site: Path, mirrored: dict[str, Any]) -> None:
    mirrored["events"][0]["num_steps"] = 1
    with pytest.raises(LedgerError, match=r"row 1 .* do not match"):
        recover(site / "ledger.sqlite", [mirrored], DELTA)
    with pytest.raises(LedgerError, match="not an export"):
        recover(site / "ledger.sqlite", [{"format": "something"}], DELTA)


def test_two_data_sets_come_back_together(site: Path, mirrored: dict[str, Any]) -> None:
    opened(site, "tiles").reserve("study", 1, 0, MECHANISM, None)
    tiles = opened(site, "tiles").export()
    forget(site)
    assert recover(site / "ledger.sqlite", [mirrored, tiles], DELTA) == {ACCOUNT: 8, ("north", "tiles"): 1}
    assert LedgerFile(site / "ledger.sqlite").accounts() == [("north", "scans"), ("north", "tiles")]


def test_the_command_recovers_from_a_runs_folder(
    site: Path, tmp_path: Path, mirrored: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.json").write_text(json.dumps({"north": mirrored}))
    forget(site)
    recover_command(hospital="north", state=site, mirror=[run])
    answer = capsys.readouterr().out
    assert "8 rows added; everything mirrored is charged" in answer
    assert "another key" not in answer
    (site / KEY_NAME).unlink()
    recover_command(hospital="north", state=site, mirror=[run])
    assert f"now signed with another key, {load_key(site / KEY_NAME).public_key}" in capsys.readouterr().out
    with pytest.raises(LedgerError, match="no mirror given holds a ledger of hospital 'south'"):
        recover_command(hospital="south", state=site, mirror=[run])


def test_charges_that_are_there_already_still_connect_the_two_histories(tmp_path: Path) -> None:
    """The mirror saw a reservation settled; the backup holds it open and went on otherwise: nothing is missing."""
    site, backup = tmp_path / "site", tmp_path / "backup"
    site.mkdir()
    reservation = opened(site).reserve("study", 1, 0, MECHANISM, None)
    shutil.copytree(site, backup)
    opened(site).settle(reservation)
    mirrored = opened(site).export()
    opened(backup).reserve("other", 1, 0, MECHANISM, None)
    recover(backup / "ledger.sqlite", [mirrored], DELTA)
    assert steps(opened(backup, expected=head(mirrored))) == 4


def test_receipts_carry_the_head(site: Path) -> None:
    ledger = opened(site)
    assert ledger.spent().ledger_head == str(ledger.head())


def with_bad_pages(path: Path, share: float) -> int:
    """Overwrite pages in the middle of a ledger's file; return how many of its rows can still be read."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(path.read_bytes())
    pages = len(content) // 4096
    for page in range(int(pages * 0.6), int(pages * (0.6 + share))):
        content[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    path.write_bytes(content)
    return len(_readable_rows(path)[0])


def test_a_bad_page_does_not_hide_the_rows_on_the_others(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    one, two = opened(site), opened(site, "second")
    train(one, range(60))
    early = one.export()
    train(two, range(60))
    train(one, range(60, 90), "later")
    whole, other = one.export(), two.export()
    before = steps(one), steps(two)
    readable = with_bad_pages(site / "ledger.sqlite", 0.1)
    assert 0 < readable < 300
    with pytest.raises(LedgerError, match="no mirror was given: second"):
        recover(site / "ledger.sqlite", [early], DELTA)
    with pytest.raises(LedgerError, match="what the others charged is unknown"):
        recover(
            site / "ledger.sqlite", [early, {**other, "events": [], "head": str(genesis("north", "second"))}], DELTA
        )
    assert (site / "ledger.sqlite").exists()
    recover(site / "ledger.sqlite", [whole, other], DELTA)
    assert (steps(opened(site)), steps(opened(site, "second"))) == before
