"""What the mirror binds: every charge of the history before, and the key that was pinned for a hospital."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_files import (
    ACCOUNT,
    DELTA,
    MECHANISM,
    NEW_KEY,
    POLICIES,
    opened,
    public_key,
    rows_of,
    train,
    with_the_key_of,
)

from medfl_ray.cli.privacy_ledger import accept_key as accept_key_command
from medfl_ray.cli.privacy_ledger import verify as verify_command
from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.run.mirror import RunMirror


def head_of(mirror: RunMirror) -> LedgerHead:
    return LedgerHead.parse(mirror.heads(["north"])["north"])


def events_kept(copies: LedgerMirror) -> list[dict[str, Any]]:
    export = copies.export(*ACCOUNT)
    assert export is not None
    return list(export["events"])


def test_hole_a_recover_row_under_a_new_key_does_not_empty_the_account(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    """Whoever can write the state folder has not the key: one row that names the old head carries nothing over."""
    before, head = events_kept(copies), head_of(mirror)
    forged = opened(tmp_path / "forged")
    forged.charge_again([], head)
    problems = mirror.keep(rows_of(opened(tmp_path / "forged", [head])))
    assert "signed with another key" in problems.get("north", "taken")
    assert "accept-key --hospital north --data-set scans" in problems.get("north", "taken")
    assert (head_of(mirror), events_kept(copies)) == (head, before)


def everything(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    ledger.charge_again([row for row in lost.events() if row.kind == "reserve"], head)


def nothing(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    ledger.charge_again([], head)


def all_but_one(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    ledger.charge_again([row for row in lost.events() if row.kind == "reserve"][:-1], head)


def cheaper(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    charged = [row for row in lost.events() if row.kind == "reserve"]
    ledger.charge_again([charged[0], dataclasses.replace(charged[1], noise_multiplier=90.0)], head)


def one_of_them_twice(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    charged = [row for row in lost.events() if row.kind == "reserve"]
    ledger.charge_again([charged[0], charged[0]], head)


def as_open_reservations(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    """Charge the same again, but so that it can still be given back once the mirror has taken it."""
    train(ledger, 1, 2, settle=False)
    ledger.charge_again([], head)


def and_gives_them_back(ledger: PrivacyLedger, lost: PrivacyLedger, head: LedgerHead) -> None:
    for reservation in train(ledger, 1, 2, settle=False):
        ledger.release(reservation, "pretended never to have trained")
    ledger.charge_again([], head)


@pytest.mark.parametrize(
    "history", [nothing, all_but_one, cheaper, one_of_them_twice, as_open_reservations, and_gives_them_back]
)
def test_hole_a_new_history_carries_over_every_charge_of_the_old_one(
    tmp_path: Path,
    site: Path,
    mirror: RunMirror,
    copies: LedgerMirror,
    history: Callable[[PrivacyLedger, PrivacyLedger, LedgerHead], None],
) -> None:
    """Not even the hospital's own key lets a history begin anew with less."""
    before, head = events_kept(copies), head_of(mirror)
    ledger = with_the_key_of(site, tmp_path / "new")
    history(ledger, opened(site), head)
    assert "does not carry over all that was charged" in mirror.keep(rows_of(ledger)).get("north", "taken")
    assert events_kept(copies) == before
    honest = with_the_key_of(site, tmp_path / "honest")
    everything(honest, opened(site), head)
    assert mirror.keep(rows_of(honest)) == {}


def test_hole_what_recovery_has_charged_again_is_never_given_back(
    tmp_path: Path, site: Path, mirror: RunMirror
) -> None:
    ledger = with_the_key_of(site, tmp_path / "new")
    everything(ledger, opened(site), head_of(mirror))
    assert mirror.keep(rows_of(ledger)) == {}
    with ledger._appending("release") as append:  # past the library's own refusal
        first = ledger._rows[0]
        append(job=first.job, round=first.round, attempt=first.attempt, closes=first.reservation, reason="free again")
    assert "gives back what recovery has charged again" in mirror.keep(ledger.rows_after({})).get("north", "taken")
    with pytest.raises(LedgerError, match="gives back what recovery has charged again"):
        opened(tmp_path / "new")


def test_recovery_refuses_to_release_what_it_charged_again(tmp_path: Path, site: Path, mirror: RunMirror) -> None:
    ledger = with_the_key_of(site, tmp_path / "new")
    everything(ledger, opened(site), head_of(mirror))
    reservation = ledger.events()[0].reservation
    assert reservation is not None
    with pytest.raises(LedgerError, match="it stays charged"):
        ledger.release(reservation, "never trained here")
    opened(tmp_path / "new").verify()


def test_hole_an_unprotected_account_does_not_become_finite_in_a_new_history(
    tmp_path: Path, site: Path, mirror: RunMirror
) -> None:
    opened(site).mark_unprotected("careless", "privacy.enable_dp is off")
    mirror.keep(rows_of(opened(site)))
    ledger = with_the_key_of(site, tmp_path / "new")
    everything(ledger, opened(site), head_of(mirror))
    assert "job 'careless' used the data without protection" in mirror.keep(rows_of(ledger)).get("north", "taken")


def test_a_recovered_backup_is_taken_although_it_held_the_reservation_open(tmp_path: Path) -> None:
    """The mirror saw it settled; recovery settles it in the old copy too, so that it cannot be given back."""
    site, backup = tmp_path / "site", tmp_path / "backup"
    (reservation,) = train(opened(site), 1, settle=False)
    shutil.copytree(site, backup)
    opened(site).settle(reservation)
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    mirror.keep(rows_of(opened(site)))
    train(opened(backup), 7)
    assert "no longer holds" in mirror.keep(rows_of(opened(backup)))["north"]
    export = LedgerMirror(tmp_path / "state" / "_mirror").export(*ACCOUNT)
    assert export is not None
    recover(backup / "ledger.sqlite", [export], DELTA)
    assert mirror.keep(rows_of(opened(backup))) == {}
    with pytest.raises(LedgerError, match="has closed it"):
        opened(backup).release(reservation, "pretended never to have trained")


def test_hole_rows_of_another_hospital_neither_lock_it_out_nor_charge_it(
    tmp_path: Path, site: Path, mirror: RunMirror, copies: LedgerMirror
) -> None:
    """South answers with rows that name north; north's head stands in every receipt."""
    evil = opened(tmp_path / "evil")
    evil.charge_again([], head_of(mirror))
    assert "north" in mirror.keep(rows_of(evil))
    evil.reserve("x", 1, 1, MECHANISM.model_copy(update={"noise_multiplier": 0.5}), None)
    assert "north" in mirror.keep(evil.rows_after(mirror.heads(["north"])))
    ledger = opened(site)
    ledger.check_heads(mirror.heads(["north"]))
    before = ledger.spent().epsilon
    train(ledger, 3)
    assert mirror.keep(ledger.rows_after(mirror.heads(["north"]))) == {}
    export = copies.export(*ACCOUNT)
    assert export is not None
    assert recover(site / "ledger.sqlite", [export], DELTA) == {ACCOUNT: 0}
    assert before < opened(site).spent().epsilon < before * 1.5


def test_hole_bad_rows_at_the_first_contact_pin_no_key(tmp_path: Path, site: Path) -> None:
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    (rows,) = rows_of(opened(site))
    assert mirror.keep([rows.model_copy(update={"public_key": NEW_KEY})]) != {}
    assert mirror.keep([rows]) == {}


@pytest.mark.parametrize("name", ["sequence", "reservation", "reason", "num_steps", "hash", "at", "noise_multiplier"])
@pytest.mark.parametrize("value", [[], {}, True, b"1"])
def test_hole_a_row_of_odd_types_is_refused_and_stops_nobody(
    tmp_path: Path, site: Path, name: str, value: object
) -> None:
    """One hospital's answer must not end the coordinator with another error than a refusal."""
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    (rows,) = rows_of(opened(site))
    odd = rows.model_copy(update={"events": ({**rows.events[0], name: value}, *rows.events[1:])})
    assert "another type" in mirror.keep([odd])["north"]
    assert mirror.keep([rows]) == {}
    assert set(mirror.keep([odd])) == {"north"}


def test_the_key_of_the_first_contact_is_pinned(tmp_path: Path, site: Path) -> None:
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    assert mirror.pin({"north": public_key(site)}) == {}
    assert mirror.pin({"north": public_key(site)}) == {}
    assert mirror.heads(["north"]) == {}
    problems = mirror.pin({"north": NEW_KEY, "south": NEW_KEY})
    assert set(problems) == {"north"}
    assert "signed with another key (abababababababab...)" in problems.get("north", "taken")
    assert mirror.pin({"elsewhere": NEW_KEY}) == {}
    assert mirror.keep(rows_of(opened(site))) == {}
    evil = opened(tmp_path / "evil")
    train(evil, 1)
    assert "signed with another key" in RunMirror(POLICIES, tmp_path / "other", tmp_path / "state").keep(
        rows_of(evil)
    )["north"]  # fmt: skip


def test_a_key_pinned_at_enrolment_is_the_only_one_that_may_make_contact(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    accept_key_command(hospital="north", data_set="scans", key=public_key(site).upper())
    assert "the key is pinned, before any contact; receipt 1" in capsys.readouterr().out
    accept_key_command(hospital="north", data_set="scans", key=public_key(site))
    assert "pinned already" in capsys.readouterr().out
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "medfl-ray")
    assert set(mirror.pin({"north": NEW_KEY})) == {"north"}
    evil = opened(tmp_path / "evil")
    train(evil, 1)
    assert set(mirror.keep(rows_of(evil))) == {"north"}
    assert mirror.pin({"north": public_key(site)}) == {}
    assert mirror.keep(rows_of(opened(site))) == {}
    verify_command(tmp_path / "medfl-ray" / "_mirror")
    assert "4 rows are whole and signed" in capsys.readouterr().out
    with pytest.raises(LedgerError, match="expected 64 hex digits"):
        accept_key_command(hospital="north", data_set="scans", key="beef")
