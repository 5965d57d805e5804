"""An operator's word for a new key is a receipt: altered receipts, keys and mirrored rows are found."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_files import ACCOUNT, DELTA, NEW_KEY, POLICIES, opened, public_key, rows_of, train

from medfl_ray.cli.privacy_ledger import accept_key as accept_key_command
from medfl_ray.cli.privacy_ledger import verify as verify_command
from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger.key_receipts import KEY_RECEIPTS
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.mirror_file import MIRROR_NAME
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.run.mirror import RunMirror


@pytest.fixture
def accepted(tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror) -> Path:
    """A mirror's folder after two hospitals' keys were accepted, north's in place of an earlier one."""
    for name in ("one", "two"):
        opened(tmp_path / name)
        copies.accept_key(*ACCOUNT, public_key(tmp_path / name))
    copies.accept_key("south", "scans", NEW_KEY)
    return tmp_path / "state" / "_mirror"


def test_an_accepted_key_takes_over_and_the_old_one_is_refused(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror, capsys: pytest.CaptureFixture[str]
) -> None:
    export = copies.export(*ACCOUNT)
    assert export is not None
    elsewhere = tmp_path / "elsewhere"
    opened(elsewhere)
    accept_key_command("north", "scans", public_key(elsewhere), mirror=tmp_path / "state" / "_mirror")
    assert f"in place of {public_key(site)}; receipt 1" in capsys.readouterr().out
    ledger = opened(site)
    train(ledger, 3)
    assert "signed with another key" in mirror.keep(rows_of(ledger)).get("north", "taken")
    recover(elsewhere / "ledger.sqlite", [export], DELTA)
    assert mirror.keep(rows_of(opened(elsewhere))) == {}
    keys, histories = copies.verify(*ACCOUNT)
    assert keys == (public_key(site), public_key(elsewhere))
    assert [history.public_key for history in histories] == [*keys]
    verify_command(tmp_path / "state" / "_mirror")
    assert "generation 2, key 2 of those pinned" in capsys.readouterr().out


def rewrite(place: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    lines = [json.loads(line) for line in (place / KEY_RECEIPTS).read_text().splitlines()]
    (place / KEY_RECEIPTS).write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [{**lines[0], "new_key": NEW_KEY}, *lines[1:]], "receipt 1 .* do not match its hash"),
        (lambda lines: [{**lines[0], "accepted_at": "2000"}, *lines[1:]], "receipt 1 .* do not match its hash"),
        (lambda lines: lines[1:], "receipt 1 .* a row is missing"),
        (lambda lines: lines[:1], "contradict each other"),
        (lambda lines: [], "contradict each other"),
        (lambda lines: [lines[1], lines[0], lines[2]], "receipt 1 .* missing or doubled"),
        (lambda lines: [{"new_key": NEW_KEY}, *lines[1:]], "line 1 .* is no receipt"),
    ],
)
def test_hole_an_altered_receipt_of_a_key_is_found(
    accepted: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], words: str
) -> None:
    verify_command(accepted)
    rewrite(accepted, change)
    with pytest.raises(LedgerError, match=words):
        verify_command(accepted)
    with pytest.raises(LedgerError, match=words):
        LedgerMirror(accepted).pin({ACCOUNT: NEW_KEY})


def execute(place: Path, *statements: str) -> None:
    with sqlite3.connect(place / MIRROR_NAME) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (f"UPDATE keys SET public_key = '{NEW_KEY}' WHERE number = 1", "is not what the coordinator pinned"),
        (f"INSERT INTO keys VALUES ('north', 'scans', 4, '{NEW_KEY}', '00')", "is not what the coordinator pinned"),
        ("DELETE FROM keys WHERE number = 3", "names one that is not pinned"),
        ("DELETE FROM keys WHERE number = 1", "is not what the coordinator pinned"),
        ("DELETE FROM keys", "contradict each other|names one that is not pinned"),
        (f"UPDATE heads SET public_key = '{NEW_KEY}'", "is not what the coordinator signed"),
        ("DELETE FROM events WHERE sequence = 4", "rows are missing at its end"),
        ("DELETE FROM events WHERE sequence = 2", "row 2"),
    ],
)
def test_hole_an_altered_mirror_is_found_by_verification(accepted: Path, statement: str, words: str) -> None:
    execute(accepted, statement)
    with pytest.raises(LedgerError, match=words):
        verify_command(accepted)


def test_hole_mirrored_rows_under_a_key_that_was_never_pinned_are_found(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    """Rows that were exchanged together with the head that the coordinator once signed for another mirror."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "state" / "_mirror", other)
    execute(other, "DELETE FROM heads", "DELETE FROM events", "DELETE FROM keys")
    forged = opened(tmp_path / "forged")
    train(forged, 1)
    assert LedgerMirror(other).keep_rows(rows_of(forged)).problems == {}
    with sqlite3.connect(other / MIRROR_NAME) as stolen:
        rows = {table: stolen.execute(f"SELECT * FROM {table}").fetchall() for table in ("heads", "events")}
    with sqlite3.connect(tmp_path / "state" / "_mirror" / MIRROR_NAME) as target:
        for table, found in rows.items():
            target.execute(f"DELETE FROM {table}")
            target.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(found[0]))})", found)
    for action in (lambda: copies.verify(*ACCOUNT), lambda: copies.pin({ACCOUNT: public_key(site)})):
        with pytest.raises(LedgerError, match="never pinned"):
            action()
    assert "never pinned" in copies.keep_rows(rows_of(forged)).problems.get("north", "taken")


def test_a_crash_between_receipt_and_pin_is_mended_by_the_same_command(accepted: Path, tmp_path: Path) -> None:
    execute(accepted, "DELETE FROM keys WHERE number = 3")
    with pytest.raises(LedgerError, match=f"accept-key --hospital north .* {public_key(tmp_path / 'two')}"):
        LedgerMirror(accepted).pin({ACCOUNT: public_key(tmp_path / "two")})
    before = (accepted / KEY_RECEIPTS).read_text()
    assert LedgerMirror(accepted).accept_key(*ACCOUNT, public_key(tmp_path / "two")) is not None
    assert (accepted / KEY_RECEIPTS).read_text() == before
    assert LedgerMirror(accepted).verify(*ACCOUNT)[0][-1] == public_key(tmp_path / "two")


def test_a_torn_last_receipt_counts_for_nothing(accepted: Path) -> None:
    with (accepted / KEY_RECEIPTS).open("a") as file:
        file.write('{"sequence": 4, "hosp')
    verify_command(accepted)
    LedgerMirror(accepted).accept_key("west", "scans", NEW_KEY)
    verify_command(accepted)


def test_a_mirror_kept_before_keys_were_pinned_goes_on_under_the_key_of_its_rows(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    place = tmp_path / "state" / "_mirror"
    execute(place, "DROP TABLE keys")
    assert copies.verify(*ACCOUNT)[0] == (public_key(site),)
    with sqlite3.connect(place / MIRROR_NAME) as raw:
        assert raw.execute("SELECT count(*) FROM keys").fetchone() == (0,)  # looking changes nothing
    again = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    assert set(again.pin({"north": NEW_KEY})) == {"north"}
    train(opened(site), 3)
    assert again.keep(rows_of(opened(site))) == {}
    assert copies.verify(*ACCOUNT)[0] == (public_key(site),)


def test_an_earlier_generation_from_before_keys_were_pinned_still_verifies(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    export = copies.export(*ACCOUNT)
    assert export is not None
    elsewhere = opened(tmp_path / "elsewhere")
    copies.accept_key(*ACCOUNT, public_key(tmp_path / "elsewhere"))
    recover(tmp_path / "elsewhere" / "ledger.sqlite", [export], DELTA)
    mirror.keep(rows_of(elsewhere))
    place = tmp_path / "state" / "_mirror"
    execute(place, "DROP TABLE keys")
    (place / KEY_RECEIPTS).unlink()
    keys, histories = copies.verify(*ACCOUNT)
    assert keys == (public_key(tmp_path / "elsewhere"),)
    assert [history.public_key for history in histories] == [None, *keys]
    execute(
        place, "UPDATE events SET body = replace(body, '\"num_steps\": 2', '\"num_steps\": 1') WHERE generation = 1"
    )
    with pytest.raises(LedgerError, match="never pinned"):
        copies.verify(*ACCOUNT)
