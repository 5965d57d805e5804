"""The coordinator's mirror: new rows only, signed, never shortened, and on after a recovery."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.cli.privacy_ledger import recover as recover_command
from medfl_ray.cli.privacy_ledger import verify as verify_command
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import LedgerError
from medfl_ray.messages import LedgerRows, Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.mirror_file import COORDINATOR_KEY_NAME, MIRROR_NAME
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.run.mirror import RunMirror
from medfl_ray.store.state_folders import hospital_folder, mirror_folder, state_root

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
POLICY = SitePolicy(hospital="north", data_set="scans", num_patients=40)


def opened(folder: Path, heads: Any = ()) -> PrivacyLedger:
    folder.mkdir(exist_ok=True)
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, None, heads)


def train(ledger: PrivacyLedger, *rounds: int) -> None:
    for number in rounds:
        ledger.settle(ledger.reserve("study", number, 0, MECHANISM, None))


def rows_behind(ledger: PrivacyLedger, head: str | None) -> tuple[LedgerRows, ...]:
    ledger.head()
    return ledger.rows_after({"north": head} if head else {})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A hospital that has trained two rounds, with the state it had after one kept as a backup."""
    site = tmp_path / "site"
    train(opened(site), 1)
    shutil.copytree(site, tmp_path / "backup")
    train(opened(site), 2)
    return site


@pytest.fixture
def mirror(tmp_path: Path) -> RunMirror:
    return RunMirror([POLICY], tmp_path / "run", tmp_path / "state")


@pytest.fixture
def copies(tmp_path: Path) -> LedgerMirror:
    return LedgerMirror(tmp_path / "state" / "_mirror")


def test_only_new_rows_travel_and_the_copy_is_the_ledger(site: Path, mirror: RunMirror, copies: LedgerMirror) -> None:
    ledger = opened(site)
    assert mirror.heads(["north"]) == {}
    assert mirror.keep(rows_behind(ledger, None)) == {}
    head = mirror.heads(["north"])["north"]
    assert head == str(ledger.head())
    train(ledger, 3)
    (rows,) = rows_behind(ledger, head)
    assert [row["sequence"] for row in rows.events] == [5, 6]
    assert mirror.keep([rows]) == {}
    assert mirror.heads(["north"])["north"] == str(ledger.head())
    copy = copies.export("north", "scans")
    assert copy is not None
    assert copy["events"] == ledger.export()["events"]


def test_a_late_answer_and_one_that_came_twice_change_nothing(site: Path, mirror: RunMirror) -> None:
    ledger = opened(site)
    (whole,) = rows_behind(ledger, None)
    assert mirror.keep([whole]) == {}
    assert mirror.keep([whole.model_copy(update={"events": whole.events[:3]}), whole]) == {}
    assert mirror.heads(["north"])["north"] == str(ledger.head())


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path: Path, mirror: RunMirror) -> None:
    assert mirror.heads(["north"]) == {}
    assert mirror.keep([]) == {}
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("change", [{"num_steps": 1}, {"sequence": 9}, {"signature": "00" * 64}, {"kind": "settle"}])
def test_an_altered_row_is_refused_and_the_others_are_kept(tmp_path: Path, site: Path, change: dict[str, Any]) -> None:
    south = SitePolicy(hospital="south", data_set="scans", num_patients=40)
    mirror = RunMirror([POLICY, south], tmp_path / "run", tmp_path / "state")
    (rows,) = rows_behind(opened(site), None)
    bad = rows.model_copy(update={"events": ({**rows.events[0], **change}, *rows.events[1:])})
    ledger = PrivacyLedger.open(tmp_path / "south.sqlite", "south", "scans", DELTA, None)
    train(ledger, 1)
    problems = mirror.keep([bad, *ledger.rows_after({})])
    assert set(problems) == {"north"}
    assert "row 1" in problems["north"]
    assert mirror.heads(["north", "south"]) == {"south": str(ledger.head())}


def test_rows_of_another_data_set_are_refused(site: Path, mirror: RunMirror) -> None:
    (rows,) = rows_behind(opened(site), None)
    assert "not of this run" in mirror.keep([rows.model_copy(update={"data_set": "other"})])["north"]


def test_a_shorter_or_other_history_is_refused(tmp_path: Path, site: Path, copies: LedgerMirror) -> None:
    whole = opened(site).export()
    short = opened(tmp_path / "backup").export()
    copies.keep(short)
    assert copies.keep(whole) == copies.head("north", "scans") == LedgerHead.parse(whole["head"])
    with pytest.raises(LedgerError, match="no longer holds row 4"):
        copies.keep(short)
    fork = opened(tmp_path / "backup")
    train(fork, 7, 8)
    with pytest.raises(LedgerError, match="no longer holds row 4"):
        copies.keep(fork.export())


def test_after_a_recovery_with_a_new_key_the_mirror_goes_on(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    mirror.keep(rows_behind(opened(site), None))
    lost = mirror.heads(["north"])["north"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = copies.export("north", "scans")
    assert copy is not None
    recover(elsewhere / "ledger.sqlite", [copy], DELTA)
    ledger = opened(elsewhere, [LedgerHead.parse(lost)])
    ledger.check_heads({"north": lost})
    train(ledger, 3)
    assert "accept-key" in mirror.keep(rows_behind(ledger, lost))["north"]
    assert mirror.heads(["north"])["north"] == lost
    copies.accept_key("north", "scans", ledger.export()["public_key"])
    assert mirror.keep(rows_behind(ledger, lost)) == {}
    assert mirror.heads(["north"])["north"] == str(ledger.head())
    assert copies.has_seen("north", "scans", LedgerHead.parse(lost))
    assert ledger.spent().epsilon > opened(site).spent().epsilon


def test_a_key_cannot_change_within_a_history(site: Path, mirror: RunMirror) -> None:
    (rows,) = rows_behind(opened(site), None)
    mirror.keep([rows.model_copy(update={"events": rows.events[:2]})])
    problems = mirror.keep([rows.model_copy(update={"public_key": "ab" * 32})])
    assert "another key" in problems["north"]


def test_what_a_ledger_must_hold(tmp_path: Path, site: Path, mirror: RunMirror) -> None:
    """The mirror's head; and the receipt's, unless the mirror has seen that row and so goes at least as far."""
    ledger = opened(site)
    (rows,) = rows_behind(ledger, None)
    in_between = str(LedgerHead(2, rows.events[1]["hash"]))
    assert mirror.expected_heads("north") == ()
    assert mirror.expected_heads("north", in_between) == (in_between,)
    mirror.keep([rows])
    assert mirror.expected_heads("north", in_between) == (str(ledger.head()),)
    assert mirror.expected_heads("north", f"9:{'0' * 64}") == (str(ledger.head()), f"9:{'0' * 64}")


def test_an_altered_mirror_says_so(tmp_path: Path, site: Path, copies: LedgerMirror) -> None:
    copies.keep(opened(site).export())
    place = tmp_path / "state" / "_mirror"
    connection = sqlite3.connect(place / MIRROR_NAME)
    connection.execute("UPDATE heads SET sequence = 2")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="not what the coordinator signed"):
        copies.head("north", "scans")
    (place / COORDINATOR_KEY_NAME).unlink()
    with pytest.raises(LedgerError, match=r"coordinator's key .* is missing"):
        copies.head("north", "scans")
    (place / MIRROR_NAME).write_bytes(b"junk" * 1000)
    with pytest.raises(LedgerError, match="cannot be used"):
        copies.head("north", "scans")


def test_a_row_taken_out_of_the_mirror_is_found_at_recovery(tmp_path: Path, site: Path, copies: LedgerMirror) -> None:
    copies.keep(opened(site).export())
    connection = sqlite3.connect(tmp_path / "state" / "_mirror" / MIRROR_NAME)
    connection.execute("DELETE FROM events WHERE sequence = 2")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="row 2"):
        copies.export("north", "scans")


def test_two_coordinators_share_a_mirror(tmp_path: Path, site: Path) -> None:
    first, second = (RunMirror([POLICY], tmp_path / name, tmp_path / "state") for name in ("a", "b"))
    ledger = opened(site)
    first.keep(rows_behind(ledger, None))
    train(ledger, 3)
    second.keep(rows_behind(ledger, second.heads(["north"])["north"]))
    train(ledger, 4)
    assert first.keep(rows_behind(ledger, first.heads(["north"])["north"])) == {}
    assert first.heads(["north"])["north"] == str(ledger.head())


def test_the_command_recovers_from_the_users_own_mirror(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    LedgerMirror(mirror_folder(POLICY, tmp_path / "run", state_root())).keep(opened(site).export())
    recover_command(hospital="north")
    assert "3 rows added; everything mirrored is charged" in capsys.readouterr().out
    recovered = opened(hospital_folder(POLICY, tmp_path / "run", state_root()))
    assert recovered.spent().epsilon == opened(site).spent().epsilon
    verify_command(state_root() / "_mirror")
    assert "4 rows are whole and signed" in capsys.readouterr().out


def test_the_command_reads_a_synthetic_runs_own_mirror(
    tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = opened(site).export()
    LedgerMirror(tmp_path / "run" / "mirror").keep(whole)
    (tmp_path / "run" / "ledger.json").write_text(json.dumps({"north": whole}))
    recover_command(hospital="north", state=tmp_path / "other", mirror=[tmp_path / "run"])
    assert "3 rows added" in capsys.readouterr().out


def test_folders_are_absolute_where_the_run_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFL_STATE_DIR", "states")
    assert state_root() == tmp_path / "states" / "medfl-ray"
    assert hospital_folder(POLICY, Path("run"), state_root()) == tmp_path / "states" / "medfl-ray" / "north"
    synthetic = POLICY.model_copy(update={"declared": "synthetic"})
    assert hospital_folder(synthetic, Path("run"), state_root()) == tmp_path / "run" / "hospitals" / "north"
    assert mirror_folder(synthetic, Path("run"), state_root()) == tmp_path / "run" / "mirror"
