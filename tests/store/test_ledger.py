"""The privacy ledger: charges, budgets, refusals and what it promises after restarts."""

import inspect
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.errors import BudgetExceeded, LedgerError, PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.export import verify_export
from medfl_ray.store.ledger.file import KEY_NAME, LedgerFile
from medfl_ray.store.signing_key import load_key

DELTA = 1e-5


def mechanism(sigma: float = 4.0, q: float = 1.0, steps: int = 2) -> Mechanism:
    return Mechanism(
        noise_multiplier=sigma, sample_rate=q, max_grad_norm=1.0, num_steps=steps, num_patients=40, delta=DELTA
    )


def opened(folder: Path, data_set: str = "scans", max_epsilon: float | None = None, **more: object) -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", data_set, DELTA, max_epsilon, **more)  # type: ignore[arg-type]


def test_what_is_reserved_counts_until_it_is_released(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.spent().epsilon == 0.0
    first = ledger.reserve("job", 1, 0, mechanism(), None)
    one = epsilon_spent([Segment(4.0, 1.0, 2)], DELTA)
    assert ledger.spent().epsilon == one
    ledger.settle(first)
    assert ledger.spent().epsilon == one
    second = ledger.reserve("job", 2, 0, mechanism(), None)
    assert ledger.spent().epsilon == epsilon_spent([Segment(4.0, 1.0, 4)], DELTA)
    ledger.release(second, "the round was called off")
    assert ledger.spent().epsilon == one


def test_spent_carries_its_labels(tmp_path: Path) -> None:
    spent = opened(tmp_path, max_epsilon=8.0).spent()
    assert (spent.unit, spent.adjacency, spent.delta, spent.budget) == ("patient", "add_remove", DELTA, 8.0)


def test_the_account_outlives_restarts_jobs_and_experiments(tmp_path: Path) -> None:
    for job in ("first", "second", "third"):
        for round_number in (1, 2):
            ledger = opened(tmp_path)
            ledger.settle(ledger.reserve(job, round_number, 0, mechanism(), None))
    single_shot = epsilon_spent([Segment(4.0, 1.0, 12)], DELTA)
    assert opened(tmp_path).spent().epsilon == pytest.approx(single_shot, abs=1e-9)


def test_the_data_set_budget_holds_over_all_jobs(tmp_path: Path) -> None:
    budget = epsilon_spent([Segment(4.0, 1.0, 5)], DELTA)
    ledger = opened(tmp_path, max_epsilon=budget)
    ledger.settle(ledger.reserve("a", 1, 0, mechanism(), None))
    ledger.reserve("b", 1, 0, mechanism(), None)
    with pytest.raises(
        BudgetExceeded, match=r"hospital 'north' would reach epsilon=.*patient-level, add/remove.*delta"
    ):
        ledger.reserve("c", 1, 0, mechanism(), 1e6)
    assert len(ledger.events()) == 3  # a refusal charges nothing
    ledger.reserve("c", 1, 0, mechanism(steps=1), None)
    assert ledger.spent().epsilon == budget


def test_the_runs_budget_counts_that_run_alone(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    budget = epsilon_spent([Segment(4.0, 1.0, 2)], DELTA)
    ledger.reserve("a", 1, 0, mechanism(), budget)
    ledger.reserve("b", 1, 0, mechanism(), budget)
    with pytest.raises(BudgetExceeded, match="job 'b' at hospital 'north'"):
        ledger.reserve("b", 2, 0, mechanism(), budget)


def test_a_job_round_and_attempt_is_charged_once(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    first = ledger.reserve("job", 1, 0, mechanism(), None)
    with pytest.raises(LedgerError, match=r"charged already.*next attempt"):
        ledger.reserve("job", 1, 0, mechanism(), None)
    ledger.reserve("job", 1, 1, mechanism(), None)  # a retry is a new charge
    ledger.release(first, "the actor never started")
    ledger.reserve("job", 1, 0, mechanism(), None)
    assert ledger.spent().epsilon == epsilon_spent([Segment(4.0, 1.0, 4)], DELTA)


def test_a_settled_charge_cannot_be_given_back(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reservation = ledger.reserve("job", 1, 0, mechanism(), None)
    ledger.settle(reservation)
    with pytest.raises(LedgerError, match="row 2 has closed it"):
        ledger.release(reservation, "I changed my mind")
    with pytest.raises(LedgerError, match="row 2 has closed it"):
        ledger.settle(reservation)
    with pytest.raises(LedgerError, match="no such"):
        ledger.settle("0" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 3.9}, {"sample_rate": 0.99}, {"num_steps": 5}, {"max_grad_norm": 2.0},
        {"num_records": 41}, {"delta": 1e-6}, {"unit": "hospital"}, {"adjacency": "zero_out"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_hole_nothing_is_settled_but_the_mechanism_that_was_charged(tmp_path: Path, change: dict[str, Any]) -> None:
    ledger, charged = opened(tmp_path), mechanism()
    reservation = ledger.reserve("job", 1, 0, charged, None)
    other = charged.model_copy(update=change)
    column = next(iter(change)).replace("num_records", "num_patients")  # as the ledger's rows call it
    with pytest.raises(LedgerError, match=rf"would train with {column} .* was charged \(row 1\)"):
        ledger.settle(reservation, mechanism=other)
    assert [event.kind for event in ledger.events()] == ["reserve"]
    ledger.settle(reservation, mechanism=charged)
    assert [event.kind for event in opened(tmp_path).events()] == ["reserve", "settle"]


def test_accounts_of_one_file_are_apart(tmp_path: Path) -> None:
    scans, tiles = opened(tmp_path, "scans"), opened(tmp_path, "tiles")
    reservation = scans.reserve("job", 1, 0, mechanism(), None)
    assert tiles.spent().epsilon == 0.0
    tiles.reserve("job", 1, 0, mechanism(), None)
    with pytest.raises(LedgerError, match="no such"):
        tiles.settle(reservation)
    assert LedgerFile(tmp_path / "ledger.sqlite").accounts() == [("north", "scans"), ("north", "tiles")]


def test_the_budget_is_the_data_sets_whatever_its_files_hold(tmp_path: Path) -> None:
    """Neither another job nor a changed file opens a new budget: hospital and data set are all that the key holds."""
    budget = epsilon_spent([Segment(4.0, 1.0, 3)], DELTA)
    ledger = opened(tmp_path, max_epsilon=budget)
    ledger.reserve("before", 1, 0, mechanism(), None)
    (tmp_path / "one patient more.nii.gz").write_bytes(b"more")
    with pytest.raises(BudgetExceeded, match="hospital 'north' would reach"):
        opened(tmp_path, max_epsilon=budget).reserve("after", 1, 0, mechanism(), None)


def test_hole_no_new_row_tells_what_the_data_hold(tmp_path: Path) -> None:
    """A hash of private contents in two rows says whether a patient was added between them."""
    ledger = opened(tmp_path)
    ledger.settle(ledger.reserve("job", 1, 0, mechanism(), None))
    ledger.mark_unprotected("other", "privacy.enable_dp is off")
    assert {row["fingerprint"] for row in ledger.export()["events"]} == {None}
    assert "fingerprint" not in inspect.signature(PrivacyLedger.reserve).parameters
    key = load_key(tmp_path / KEY_NAME)  # an HMAC may stay where the data are
    assert key.fingerprint(["a", "b"]) == key.fingerprint(["b", "a"]) != key.fingerprint(["a", "b", "c"])


def test_a_row_of_an_earlier_version_keeps_its_fingerprint_and_verifies(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    with ledger._appending("reserve") as append:
        append(job="old", round=1, attempt=1, reservation="r" * 32, fingerprint="f" * 64, **mechanism().model_dump())
    assert opened(tmp_path).events()[0].fingerprint == "f" * 64
    verify_export(json.loads(json.dumps(ledger.export())))


def test_baselines_and_studies_of_a_run_share_one_budget(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    budget = epsilon_spent([Segment(4.0, 1.0, 4)], DELTA)
    ledger.reserve("run", 1, 0, mechanism(), budget)
    ledger.reserve("run/local", 1, 0, mechanism(), budget)
    ledger.reserve("run/central", 1, 0, mechanism(), budget)
    with pytest.raises(BudgetExceeded, match=r"'run/coalition', with the other .*privacy\.extra_epsilon"):
        ledger.reserve("run/coalition", 1, 0, mechanism(steps=1), budget)
    ledger.reserve("run", 2, 0, mechanism(), budget)
    ledger.reserve("other/local", 1, 0, mechanism(), budget)
    with pytest.raises(BudgetExceeded, match="its budget is 0 "):
        ledger.reserve("third/local", 1, 0, mechanism(), 0.0)


def test_rows_are_events_and_hold_no_epsilon(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.settle(ledger.reserve("job", 3, 1, mechanism(2.0, 0.5, 7), None))
    row = ledger.events()[0].to_dict()
    assert not any("epsilon" in name for name in row)
    expected = {
        "kind": "reserve",
        "job": "job",
        "round": 3,
        "attempt": 1,
        "noise_multiplier": 2.0,
        "sample_rate": 0.5,
        "num_steps": 7,
        "max_grad_norm": 1.0,
        "unit": "patient",
        "adjacency": "add_remove",
        "hospital": "north",
        "data_set": "scans",
    }
    assert expected.items() <= row.items()


def test_the_export_is_plain_data_that_anybody_can_check(tmp_path: Path) -> None:
    ledger = opened(tmp_path, max_epsilon=9.0)
    ledger.settle(ledger.reserve("job", 1, 0, mechanism(), None))
    export = json.loads(json.dumps(ledger.export()))
    assert (export["unit"], export["adjacency"], export["delta"]) == ("patient", "add_remove", DELTA)
    assert export["spent"]["epsilon"] == ledger.spent().epsilon
    assert verify_export(export) == ledger.head()


def test_two_ledgers_see_each_others_rows(tmp_path: Path) -> None:
    budget = epsilon_spent([Segment(4.0, 1.0, 2)], DELTA)
    one, other = opened(tmp_path, max_epsilon=budget), opened(tmp_path, max_epsilon=budget)
    one.reserve("job", 1, 0, mechanism(), None)
    with pytest.raises(BudgetExceeded):
        other.reserve("other", 1, 0, mechanism(), None)
    assert other.spent() == one.spent()


@pytest.mark.parametrize(("sigma", "q"), [(float("nan"), 0.5), (0.0, 0.5), (1.0, 0.0), (1.0, 2.0)])
def test_an_impossible_mechanism_is_not_charged(tmp_path: Path, sigma: float, q: float) -> None:
    ledger = opened(tmp_path)
    impossible = mechanism().model_copy(update={"noise_multiplier": sigma, "sample_rate": q})  # as no message can be
    with pytest.raises(PrivacyConfigError):
        ledger.reserve("job", 1, 0, impossible, None)
    assert ledger.events() == ()


def test_impossible_accounts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match="delta"):
        PrivacyLedger.open(tmp_path / "ledger.sqlite", "north", "scans", 1.5, None)
    with pytest.raises(PrivacyConfigError, match="max_epsilon"):
        opened(tmp_path, max_epsilon=-1.0)


def test_equal_histories_are_accounted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medfl_ray.privacy import accountant

    accountant._epsilon.cache_clear()
    for hospital in ("a", "b", "c", "d"):
        ledger = (
            PrivacyLedger.open(tmp_path / hospital / "ledger.sqlite", hospital, "scans", DELTA, 8.0)
            if ((tmp_path / hospital).mkdir() is None)
            else None
        )
        assert ledger is not None
        ledger.reserve("job", 1, 0, mechanism(), 8.0)
        ledger.spent()
    assert accountant._epsilon.cache_info().misses == 1


def test_sqlite_is_set_to_survive_a_power_cut(tmp_path: Path) -> None:
    opened(tmp_path)
    with LedgerFile(tmp_path / "ledger.sqlite").reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_the_key_is_its_owners_alone(tmp_path: Path) -> None:
    opened(tmp_path)
    path = tmp_path / KEY_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert "private" not in repr(load_key(path)).lower()
    path.chmod(0o644)
    with pytest.raises(LedgerError, match="chmod 600"):
        opened(tmp_path)


def test_rows_cannot_be_changed_with_sql(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.reserve("job", 1, 0, mechanism(), None)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        for statement in ("UPDATE ledger_events SET num_steps = 0", "DELETE FROM ledger_events"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    connection.close()


def test_without_a_declared_budget_only_the_first_run_may_spend(tmp_path: Path) -> None:
    ledger = opened(tmp_path, max_epsilon=50.0, one_run=True)
    ledger.release(ledger.reserve("called-off", 1, 1, mechanism(), None), "below quorum")
    ledger.reserve("first", 1, 1, mechanism(), None)
    ledger.reserve("first/local", 1, 1, mechanism(), None)
    with pytest.raises(BudgetExceeded, match="run 'first' has spent already"):
        opened(tmp_path, max_epsilon=500.0, one_run=True).reserve("second", 1, 1, mechanism(), None)
    opened(tmp_path, max_epsilon=500.0).reserve("second", 1, 1, mechanism(), None)


def test_the_lifetime_number_of_steps_is_kept_over_runs(tmp_path: Path) -> None:
    first = opened(tmp_path, max_steps=4)
    kept = first.reserve("one", 1, 0, mechanism(), None)
    first.release(first.reserve("one", 2, 0, mechanism(), None), "never trained")
    first.settle(kept)
    second = opened(tmp_path, max_steps=4)
    second.reserve("two", 1, 0, mechanism(), None)
    with pytest.raises(BudgetExceeded, match="private steps on data set 'scans' in all"):
        second.reserve("two", 2, 0, mechanism(), None)
    assert second.spent().epsilon == epsilon_spent([Segment(4.0, 1.0, 4)], DELTA)
