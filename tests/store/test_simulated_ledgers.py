"""The accounts of a simulation in one file: charged together, each refused for itself, none forgotten."""

import sqlite3

import pytest

from medfl_ray.errors import LedgerError, PrivacyError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.simulated import Account, SimulatedLedgers

DELTA = 1e-5
NAMES = ("north", "south", "west")


def mechanism(steps=4):
    return Mechanism(
        noise_multiplier=1.0, sample_rate=0.1, max_grad_norm=1.0, num_steps=steps, num_patients=40, delta=DELTA
    )


def accounts(limits=None):
    return lambda hospital: Account(hospital, "scans", DELTA, (limits or {}).get(hospital))


def charge(ledgers, round, names=NAMES, budget=None):
    return ledgers.reserve(("job", round, 1), dict.fromkeys(names, mechanism()), budget, {})


def epsilons(ledgers, names=NAMES):
    return {name: spent.epsilon for name, spent in ledgers.spent(names).items()}


def expected(rounds):
    return epsilon_spent([Segment(1.0, 0.1, 4 * rounds)], DELTA)


def test_charges_of_many_rounds_are_each_hospitals_own_and_outlive_the_process(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts())
    for round in (1, 2):
        ledgers.settle(charge(ledgers, round))
    ledgers.settle(charge(ledgers, 3, ["north"]))
    again = SimulatedLedgers(tmp_path, accounts())
    for opened in (ledgers, again):
        found = epsilons(opened)
        assert found["north"] == pytest.approx(expected(3), abs=1e-3)
        assert found["south"] == found["west"] == pytest.approx(expected(2), abs=1e-3)
    assert set(again.export(NAMES)) == set(NAMES)


def test_a_hospital_without_budget_is_refused_and_the_others_are_charged(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts({"south": expected(1) / 2}))
    answers = charge(ledgers, 1)
    assert isinstance(answers["south"], PrivacyError)
    assert isinstance(answers["north"], str)
    found = epsilons(ledgers)
    assert found["south"] == 0
    assert found["north"] == pytest.approx(expected(1), abs=1e-3)


def test_what_one_job_may_spend_bounds_its_charges(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts())
    budget = (expected(1) + expected(2)) / 2
    ledgers.settle(charge(ledgers, 1, ["north"], budget))
    assert isinstance(charge(ledgers, 2, ["north"], budget)["north"], PrivacyError)


def test_an_open_reservation_counts_until_it_is_given_back(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts())
    reserved = charge(ledgers, 1)
    assert epsilons(ledgers)["west"] == pytest.approx(expected(1), abs=1e-3)
    ledgers.release(reserved, "below quorum")
    assert set(epsilons(SimulatedLedgers(tmp_path, accounts())).values()) == {0.0}


def test_settling_is_all_or_nothing(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts())
    reserved = charge(ledgers, 1)
    with pytest.raises(LedgerError):
        ledgers.settle({**reserved, "west": "no such reservation"})
    ledgers.release({"north": reserved["north"]}, "was not settled after all")
    assert epsilons(ledgers)["north"] == 0


def test_a_head_that_the_file_lacks_blocks_that_hospital_alone(tmp_path):
    first = SimulatedLedgers(tmp_path / "a", accounts())
    first.settle(charge(first, 1))
    heads = {name: str(spent.ledger_head) for name, spent in first.spent(NAMES).items()}
    other = SimulatedLedgers(tmp_path / "b", accounts())
    answers = other.reserve(("job", 2, 1), dict.fromkeys(NAMES, mechanism()), None, {"north": heads["north"]})
    assert isinstance(answers["north"], PrivacyError)
    assert isinstance(answers["south"], str)


def test_a_removed_row_is_noticed(tmp_path):
    ledgers = SimulatedLedgers(tmp_path, accounts())
    ledgers.settle(charge(ledgers, 1))
    del ledgers
    (file,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(file) as connection:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        counts = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}
        rows = max(counts, key=counts.get)
        assert counts[rows] >= 2 * len(NAMES)
        connection.execute(f"DELETE FROM {rows} WHERE rowid = (SELECT min(rowid) FROM {rows})")
    with pytest.raises(LedgerError):
        SimulatedLedgers(tmp_path, accounts()).spent(NAMES)
