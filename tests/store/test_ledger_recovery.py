"""Truncation, deletion, an old backup, a new node: nothing trains until the mirror is charged."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.cli.privacy_ledger import recover as recover_command
from medfl_ray.errors import LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger import PrivacyLedger
from medfl_ray.store.ledger_events import charged_segments, genesis
from medfl_ray.store.ledger_export import verify_export
from medfl_ray.store.ledger_file import KEY_NAME, LedgerFile
from medfl_ray.store.ledger_recovery import _readable_rows, recover
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


def test_junk_is_set_aside_and_the_mirror_restored(site: Path, mirrored: dict[str, Any]) -> None:
    forget(site)
    (site / "ledger.sqlite").write_bytes(b"junk" * 1000)
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
    assert "8 rows added; everything mirrored is charged" in capsys.readouterr().out
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
