"""The privacy ledger: charges, budgets, refusals and what it promises after restarts."""

import json
import sqlite3
from pathlib import Path

import pytest

from medfl_ray.errors import BudgetExceeded, LedgerError, PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger import PrivacyLedger
from medfl_ray.store.ledger_export import verify_export
from medfl_ray.store.ledger_file import KEY_NAME, LedgerFile
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


def test_accounts_of_one_file_are_apart(tmp_path: Path) -> None:
    scans, tiles = opened(tmp_path, "scans"), opened(tmp_path, "tiles")
    reservation = scans.reserve("job", 1, 0, mechanism(), None)
    assert tiles.spent().epsilon == 0.0
    tiles.reserve("job", 1, 0, mechanism(), None)
    with pytest.raises(LedgerError, match="no such"):
        tiles.settle(reservation)
    assert LedgerFile(tmp_path / "ledger.sqlite").accounts() == [("north", "scans"), ("north", "tiles")]


def test_a_fingerprint_is_evidence_and_never_the_key_of_the_budget(tmp_path: Path) -> None:
    budget = epsilon_spent([Segment(4.0, 1.0, 3)], DELTA)
    ledger = opened(tmp_path, max_epsilon=budget)
    key = load_key(tmp_path / KEY_NAME)
    before, after = key.fingerprint(["a", "b"]), key.fingerprint(["a", "b", "one file more"])
    assert before == key.fingerprint(["b", "a"]) != after
    ledger.reserve("job", 1, 0, mechanism(), None, fingerprint=before)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("job", 2, 0, mechanism(), None, fingerprint=after)
    assert ledger.events()[0].fingerprint == before


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
    with pytest.raises(PrivacyConfigError):
        ledger.reserve("job", 1, 0, mechanism(sigma, q), None)
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
