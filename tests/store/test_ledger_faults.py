"""A ledger that was altered, damaged, locked, lost or filled up: found, and said in plain words."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medfl_ray.errors import LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger import file as ledger_file
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.ledger.export import verify_export
from medfl_ray.store.ledger.file import KEY_NAME

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=4.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)


def opened(folder: Path, expected: LedgerHead | None = None) -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, None, [expected] if expected else [])


def filled(folder: Path, rounds: int = 3) -> PrivacyLedger:
    folder.mkdir(exist_ok=True)
    ledger = opened(folder)
    for number in range(1, rounds + 1):
        reservation = ledger.reserve("job", number, 0, MECHANISM, None)
        if number % 2:
            ledger.settle(reservation)
        else:
            ledger.release(reservation, "called off")
    return ledger


def execute(folder: Path, *statements: str) -> None:
    """Write behind the ledger's back, the triggers taken off first."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    for verb in ("update", "delete"):
        connection.execute(f"DROP TRIGGER IF EXISTS ledger_events_no_{verb}")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    filled(folder)
    execute(folder)
    return folder


def copied(pristine: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(pristine, to)
    return to


@pytest.mark.parametrize(
    "column",
    [
        "num_steps = num_steps - 1",
        "noise_multiplier = 40.0",
        "sample_rate = 0.1",
        "job = 'x'",
        "kind = 'settle'",
        "round = 9",
        "attempt = 9",
        "at = '2000'",
        "fingerprint = 'f'",
        "reason = 'r'",
        "max_grad_norm = 9",
        "delta = 0.1",
        "unit = 'image'",
        "adjacency = 'replace'",
        "num_patients = 1",
        "hash = 'beef'",
        "previous_hash = 'beef'",
        "signature = 'beef'",
        "sequence = 30",
    ],
)
def test_an_altered_field_is_found_and_its_row_named(pristine: Path, tmp_path: Path, column: str) -> None:
    folder = copied(pristine, tmp_path / "copy")
    execute(folder, f"UPDATE ledger_events SET {column} WHERE sequence = 3")
    with pytest.raises(LedgerError, match="row 3 of the privacy ledger of hospital 'north', data set 'scans', is bad"):
        opened(folder)


def test_a_row_taken_out_of_the_middle_is_found(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "copy")
    execute(folder, "PRAGMA foreign_keys = OFF", "DELETE FROM ledger_events WHERE sequence = 2")
    with pytest.raises(LedgerError, match=r"row 2 .* numbered 3"):
        opened(folder)


def test_a_row_signed_with_another_key_is_found(pristine: Path, tmp_path: Path) -> None:
    folder, other = copied(pristine, tmp_path / "copy"), tmp_path / "other"
    filled(other)
    shutil.copy(other / KEY_NAME, folder / KEY_NAME)
    with pytest.raises(LedgerError, match=r"row 1 .*signature is not the hospital's"):
        opened(folder)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**9), mask=st.integers(1, 255))
def test_any_altered_byte_of_the_file_is_found_or_changes_no_row(
    pristine: Path, tmp_path: Path, position: int, mask: int
) -> None:
    folder = copied(pristine, tmp_path / "copy")
    truth = opened(pristine).events()
    path = folder / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= mask
    path.write_bytes(content)
    try:
        seen = opened(folder).events()
    except LedgerError:
        return
    assert seen == truth


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_altered_value_of_an_export_is_found(pristine: Path, data: st.DataObject) -> None:
    export = opened(pristine).export()
    row = data.draw(st.sampled_from(export["events"]))
    name = data.draw(st.sampled_from(sorted(row)))
    row[name] = data.draw(
        st.one_of(st.none(), st.text(max_size=5), st.integers(), st.floats()).filter(
            lambda value: value != row[name] or type(value) is not type(row[name])
        )
    )
    with pytest.raises(LedgerError, match=r"is bad|fields"):
        verify_export(export)


def test_a_cut_tail_is_found_with_the_head_of_a_mirror(pristine: Path, tmp_path: Path) -> None:
    head = opened(pristine).head()
    folder = copied(pristine, tmp_path / "copy")
    execute(folder, "DELETE FROM ledger_events WHERE sequence > 4")
    assert len(opened(folder).events()) == 4  # the chain alone does not see it
    with pytest.raises(LedgerError, match=r"has 4 rows and is known to have had 6.*recover"):
        opened(folder, head)
    export = opened(pristine).export()
    del export["events"][4:]
    with pytest.raises(LedgerError, match="rows are missing at its end"):
        verify_export(export)


def test_another_history_is_found_with_the_head_of_a_mirror(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "copy")
    execute(folder, "DELETE FROM ledger_events WHERE sequence > 4")
    opened(folder).reserve("other", 1, 0, MECHANISM, None)
    opened(folder).reserve("other", 2, 0, MECHANISM, None)
    with pytest.raises(LedgerError, match="differs from its mirror at row 6"):
        opened(folder, opened(pristine).head())


def test_a_head_that_is_held_is_accepted_and_survives_its_text(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "copy")
    head = LedgerHead.parse(str(opened(folder).head()))
    opened(folder).reserve("more", 1, 0, MECHANISM, None)
    assert opened(folder, head).head().sequence == head.sequence + 1
    for text in ("", "x", "3:beef", "-1:" + "0" * 64):
        with pytest.raises(LedgerError, match="not the head"):
            LedgerHead.parse(text)


def test_rows_that_vanish_during_a_run_are_noticed(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    execute(tmp_path, "DELETE FROM ledger_events WHERE sequence > 4")
    with pytest.raises(LedgerError, match="changed behind"):
        ledger.reserve("job", 9, 0, MECHANISM, None)


def test_a_deleted_file_is_never_made_anew(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(LedgerError, match="cannot be opened"):
        ledger.reserve("job", 9, 0, MECHANISM, None)
    with pytest.raises(LedgerError, match=r"is gone although the hospital's key is there.*recover"):
        opened(tmp_path)


def test_a_lost_key_blocks_the_ledger(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / KEY_NAME).unlink()
    with pytest.raises(LedgerError, match=r"key .* is missing"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_key_is_named(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path)
    (tmp_path / KEY_NAME).write_bytes(content)
    with pytest.raises(LedgerError, match="cannot be read"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"SQLite format 3\x00" + b"\x00" * 200, os.urandom(8192)])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path)
    for path in tmp_path.glob("ledger.sqlite-*"):
        path.unlink()
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite"):
        opened(tmp_path)


def test_a_truncated_file_is_named(pristine: Path, tmp_path: Path) -> None:
    folder = copied(pristine, tmp_path / "copy")
    os.truncate(folder / "ledger.sqlite", (folder / "ledger.sqlite").stat().st_size // 2)
    with pytest.raises(LedgerError, match="damaged"):
        opened(folder)


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.execute("CREATE TABLE patients (name TEXT)")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="not a privacy ledger of medfl-ray"):
        opened(tmp_path)


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    execute(tmp_path, "PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match="has version 3; this program reads up to version 2"):
        opened(tmp_path)


def test_a_locked_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path)
    ledger._file._lock_timeout_s = 0.05
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="another process holds it"):
        ledger.reserve("job", 9, 0, MECHANISM, None)
    holder.execute("ROLLBACK")
    holder.close()
    ledger.reserve("job", 9, 0, MECHANISM, None)


def test_a_full_disk_says_so_and_charges_nothing(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    before = ledger.events()
    connect = ledger._file._connect

    def on_a_full_disk() -> sqlite3.Connection:
        connection = connect()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    ledger._file._engine.pool._creator = on_a_full_disk  # type: ignore[attr-defined]

    def charge_until_full() -> None:
        for attempt in range(100):
            ledger.reserve("job", 9, attempt, MECHANISM, None)

    with pytest.raises(LedgerError, match="the disk is full"):
        charge_until_full()
    written = ledger.events()
    assert written[: len(before)] == before
    assert opened(tmp_path).events() == written


def test_a_missing_state_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="check that the state folder exists"):
        opened(tmp_path / "nowhere")


def test_errors_name_no_absolute_path(tmp_path: Path) -> None:
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path / "nowhere")
    assert str(tmp_path) not in str(caught.value)


def test_key_and_ledger_are_made_once_by_two_processes(tmp_path: Path) -> None:
    file = ledger_file.LedgerFile(tmp_path / "ledger.sqlite")
    again = ledger_file.create_key(tmp_path / KEY_NAME)
    assert again.public_key == file.key.public_key
