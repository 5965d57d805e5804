"""Data used without differential privacy: the account's epsilon is infinite from then on, and stays so everywhere."""

import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from ledger_files import as_version_one

from medfl_ray.cli.privacy_tables import print_ledger
from medfl_ray.errors import BudgetExceeded, LedgerError
from medfl_ray.messages import Mechanism, PrivacySpent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import LedgerEvent
from medfl_ray.store.ledger.export import verify_export
from medfl_ray.store.ledger.file import KEY_NAME
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.pooled import PooledLedger
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.ledger.simulated import Account, SimulatedLedgers
from medfl_ray.store.signing_key import load_key

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=4.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
WHY = "privacy.enable_dp is off"


def opened(folder: Path, max_epsilon: float | None = None, **more: Any) -> PrivacyLedger:
    folder.mkdir(exist_ok=True)
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, max_epsilon, **more)


def test_epsilon_is_infinite_from_the_first_unprotected_job_on(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert not ledger.is_unprotected()
    ledger.mark_unprotected("run", WHY)
    assert ledger.spent().epsilon == math.inf
    ledger.reserve("later", 1, 0, MECHANISM, None)
    assert opened(tmp_path).spent().epsilon == math.inf
    assert opened(tmp_path).is_unprotected()


def test_a_job_is_marked_once(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = opened(tmp_path)
        ledger.mark_unprotected("run", WHY)
        ledger.mark_unprotected("run", "another reason")
    ledger.mark_unprotected("second", WHY)
    assert [(row.kind, row.job, row.reason) for row in ledger.events()] == [
        ("unprotected", "run", WHY),
        ("unprotected", "second", WHY),
    ]


def test_what_counts_as_a_charge(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert not ledger.has_charges()
    ledger.mark_unprotected("run", WHY)
    assert not ledger.has_charges()
    ledger.release(ledger.reserve("run", 1, 0, MECHANISM, None), "called off")
    assert ledger.has_charges()


@pytest.mark.parametrize(("job", "reason"), [("", WHY), ("run", "")])
def test_a_mark_says_whose_it_is_and_why(tmp_path: Path, job: str, reason: str) -> None:
    with pytest.raises(LedgerError, match="job and a reason"):
        opened(tmp_path).mark_unprotected(job, reason)


def test_hole_a_budget_binds_those_who_train_without_protection(tmp_path: Path) -> None:
    """An account that was used without protection has no budget left, however little was charged."""
    opened(tmp_path).mark_unprotected("careless", WHY)
    with pytest.raises(
        BudgetExceeded, match=r"the account is unprotected.*its epsilon is infinite.*budget of hospital"
    ):
        opened(tmp_path, 100.0).reserve("careful", 1, 0, MECHANISM, None)
    assert len(opened(tmp_path).events()) == 1
    allowed = opened(tmp_path, 0.001, allow_unprotected=True)
    allowed.reserve("careful", 1, 0, MECHANISM, 50.0)
    with pytest.raises(BudgetExceeded, match="job 'careful' at hospital 'north' would reach"):
        allowed.reserve("careful", 2, 0, MECHANISM, 0.001)
    with pytest.raises(BudgetExceeded, match=r"the account is unprotected.*budget of job 'careless'"):
        allowed.reserve("careless", 1, 0, MECHANISM, 50.0)


def test_the_export_stays_strict_json_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = opened(tmp_path, 8.0)
    ledger.mark_unprotected("run", WHY)
    export = json.loads(json.dumps(ledger.export(), allow_nan=False))
    assert export["spent"]["epsilon"] == "Infinity"
    assert PrivacySpent.model_validate(export["spent"]) == ledger.spent()
    assert verify_export(export) == ledger.head()
    print_ledger(export)
    assert "epsilon infinite (unprotected)" in capsys.readouterr().out


def test_the_lost_history_of_an_unprotected_account_stays_infinite(tmp_path: Path) -> None:
    """Recovery never charges less than the mirror: on a new node, from a backup, and where another history began."""
    site = tmp_path / "site"
    opened(site).reserve("run", 1, 0, MECHANISM, None)
    shutil.copytree(site, tmp_path / "backup")
    shutil.copytree(site, tmp_path / "fork")
    opened(site).mark_unprotected("run", WHY)
    mirrored = opened(site).export()
    opened(tmp_path / "fork").reserve("other", 1, 0, MECHANISM, None)
    for place in ("new", "backup", "fork"):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True, mode=0o700)
        recover(folder / "ledger.sqlite", [mirrored], DELTA)
        assert opened(folder).spent().epsilon == math.inf
        assert recover(folder / "ledger.sqlite", [mirrored], DELTA) == {("north", "scans"): 0}


def test_rows_that_only_a_damaged_file_holds_keep_it_infinite(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.reserve("run", 1, 0, MECHANISM, None)
    mirrored = ledger.export()
    ledger.mark_unprotected("run", WHY)
    (tmp_path / KEY_NAME).unlink()
    recover(tmp_path / "ledger.sqlite", [mirrored], DELTA)
    assert opened(tmp_path).spent().epsilon == math.inf


def test_a_mirror_keeps_the_mark(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "site")
    ledger.mark_unprotected("run", WHY)
    mirror = LedgerMirror(tmp_path / "mirror")
    mirror.keep(ledger.export())
    copy = mirror.export("north", "scans")
    assert copy is not None
    assert copy["events"] == ledger.export()["events"]


def test_every_member_of_pooled_training_is_marked(tmp_path: Path) -> None:
    members = []
    for hospital in ("north", "south"):
        (tmp_path / hospital).mkdir()
        members.append(PrivacyLedger.open(tmp_path / hospital / "ledger.sqlite", hospital, "scans", DELTA, None))
    pooled = PooledLedger(members)
    members[1].reserve("own", 1, 0, MECHANISM, None)
    assert pooled.has_charges()
    assert not pooled.is_unprotected()
    pooled.mark_unprotected("run", WHY)
    assert [member.spent().epsilon for member in members] == [math.inf, math.inf]
    assert pooled.is_unprotected()
    assert pooled.spent().is_unprotected


def test_simulated_hospitals_are_marked_in_one_file(tmp_path: Path) -> None:
    ledgers = SimulatedLedgers(tmp_path, lambda hospital: Account(hospital, "scans", DELTA, 8.0))
    ledgers.mark_unprotected(["north"], "run", WHY)
    spent = SimulatedLedgers(tmp_path, lambda hospital: Account(hospital, "scans", DELTA, 8.0)).spent(
        ["north", "south"]
    )
    assert (spent["north"].epsilon, spent["south"].epsilon) == (math.inf, 0.0)
    assert not ledgers.has_charges("north")
    answers = ledgers.reserve(("job", 1, 1), {"north": MECHANISM}, None, {})
    assert isinstance(answers["north"], BudgetExceeded)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "unprotected", "reason": WHY}, "does not say which job"),
        ({"kind": "unprotected", "job": "run"}, "does not say which job"),
        ({"kind": "forgiven", "job": "run", "reason": WHY}, "kind 'forgiven' is unknown"),
    ],
)
def test_a_signed_row_without_meaning_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    export = opened(tmp_path).export()
    row = LedgerEvent(hospital="north", data_set="scans", sequence=1, at="", previous_hash=export["head"][2:], **fields)
    sealed = row.sealed(load_key(tmp_path / KEY_NAME))
    with pytest.raises(LedgerError, match=words):
        verify_export({**export, "events": [sealed.to_dict()], "head": str(sealed.head)})


def test_a_ledger_of_the_first_version_opens_and_takes_the_mark(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.settle(ledger.reserve("old", 1, 0, MECHANISM, None))
    ledger.release(ledger.reserve("old", 2, 0, MECHANISM, None), "called off")
    before = ledger.events()
    as_version_one(tmp_path / "ledger.sqlite")
    old, other = opened(tmp_path), opened(tmp_path)
    assert old.events() == before
    old.reserve("new", 1, 0, MECHANISM, None)  # no upgrade is needed for what the first version knew
    old.mark_unprotected("new", WHY)
    assert other.spent().epsilon == math.inf
    assert opened(tmp_path).events()[:4] == before
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (2,)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute("UPDATE ledger_events SET num_steps = 1")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute("DELETE FROM ledger_events")
