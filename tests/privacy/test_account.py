"""One account: which part of an epsilon is whose, what bounds it, and that the ledger itself computes the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_runs import small_run

from medfl_ray.messages import Mechanism
from medfl_ray.privacy.account import (
    Budgets,
    PrivacyAccount,
    Spending,
    account_of,
    budgets_of,
    epsilon_words,
    parts_words,
    remaining_words,
    rounded_up,
)
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.account import PrivacyLedger

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=2.0, sample_rate=0.5, max_grad_norm=1.0, num_steps=3, num_patients=40, delta=DELTA
)
ONE = Segment(2.0, 0.5, 3)
BUDGETS = Budgets(run=8.0, extra=10.0, lifetime=50.0)


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    """Charged by an earlier run, by two rounds of `job` with its baselines, and once in vain."""
    opened = PrivacyLedger.open(tmp_path / "ledger.sqlite", "north", "scans", DELTA, 50.0)
    for job, number in (("earlier", 1), ("job", 1), ("job", 2), ("job/local", 1), ("job/central", 1), ("job-2", 1)):
        opened.settle(opened.reserve(job, number, 1, MECHANISM, None))
    opened.release(opened.reserve("job", 3, 1, MECHANISM, None), "nobody trained")
    return opened


def account(ledger: PrivacyLedger, budgets: Budgets = BUDGETS) -> PrivacyAccount:
    export = ledger.export()
    names = (export["hospital"], export["data_set"])
    return account_of(names, export["events"], "job", export["delta"], budgets, export["head"])


def test_the_total_is_the_ledgers_own_and_its_parts_are_those_of_the_run(ledger):
    found = account(ledger)
    assert found.total.epsilon == ledger.spent().epsilon == epsilon_spent([ONE] * 6, DELTA)
    assert found.run.epsilon == found.extra.epsilon == epsilon_spent([ONE] * 2, DELTA)
    assert found.ledger_head == ledger.spent().ledger_head
    assert found.terms == "patient-level, add/remove, delta 1e-05"


def test_every_budget_stands_beside_the_part_that_it_bounds(ledger):
    found = account(ledger)
    own, total = epsilon_words(found.run.epsilon), found.total
    left = remaining_words(total)
    assert parts_words(found) == (
        f"the run's rounds {own} of their budget 8; its baselines and studies {own} of their budget 10; "
        f"lifetime budget 50, of which {left} remains"
    )
    assert total.remaining == pytest.approx(50 - total.epsilon)
    assert float(left) <= total.remaining
    assert "no lifetime budget" in parts_words(account(ledger, Budgets(run=8.0)))


def test_a_part_that_is_accounted_at_another_delta_says_so(ledger):
    found = account_of(("north", "scans"), ledger.export()["events"], "job", 1e-7, Budgets())
    assert (found.total.delta, found.run.delta) == (1e-7, DELTA)
    assert "at delta 1e-05" in parts_words(found)


@pytest.mark.parametrize(("job", "is_of_run"), [("job", True), ("job/local", True), ("earlier", False)])
def test_hole_an_account_that_was_used_without_protection_is_infinite_for_good(ledger, job, is_of_run):
    ledger.mark_unprotected(job, "trained without differential privacy")
    found = account(ledger)
    assert found.is_unprotected
    assert found.total.epsilon == ledger.spent().epsilon == math.inf
    assert math.isinf(found.run.epsilon) == math.isinf(found.extra.epsilon) == is_of_run
    assert found.total.remaining == 0
    assert found.to_json()["total"]["epsilon"] == "Infinity"
    assert type(found).model_validate(found.to_json()) == found
    assert epsilon_words(found.total.epsilon) == "infinite (unprotected)"


@pytest.mark.parametrize(
    ("epsilon", "digits", "words"),
    [
        (7.9, 1, "7.9"),
        (1.1, 2, "1.10"),
        (7.991, 2, "8.00"),
        (8.0, 3, "8.000"),
        (12.0800001, 3, "12.081"),
        (0, 2, "0.00"),
    ],
)
def test_an_epsilon_is_rounded_up_and_a_round_one_stays(epsilon, digits, words):
    assert epsilon_words(epsilon, digits) == words
    assert rounded_up(epsilon, digits) >= epsilon - 1e-9


def test_what_remains_is_rounded_down_and_never_below_nothing():
    assert remaining_words(Spending(epsilon=1.001, delta=DELTA, budget=2.0)) == "0.99"
    assert remaining_words(Spending(epsilon=3.0, delta=DELTA, budget=2.0)) == "0.00"
    assert remaining_words(Spending(epsilon=3.0, delta=DELTA)) == "-"


def test_budgets_bind_in_their_own_unit_alone():
    private = {"enable_dp": True, "epsilon": 8.0}
    patient, hospital = small_run(privacy=private), small_run(privacy={**private, "unit": "hospital"})
    assert budgets_of(patient, "patient", "private", 9.0) == Budgets(run=8.0, extra=0.0, lifetime=9.0)
    assert budgets_of(patient, "patient", "synthetic", None) == Budgets(run=8.0)
    assert budgets_of(hospital, "hospital", None, 9.0) == Budgets(run=8.0, lifetime=9.0)
    assert budgets_of(hospital, "patient", "private", 9.0) == Budgets(lifetime=9.0)
    given = small_run(privacy={**private, "extra_epsilon": 3.0})
    assert budgets_of(given, "patient", "private", None) == Budgets(run=8.0, extra=3.0)
    assert budgets_of(small_run(), "patient", "private", None) == Budgets()
