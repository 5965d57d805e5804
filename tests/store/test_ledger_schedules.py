"""Many runs, restarts, retries and releases on one data set: the account adds up and the budget holds."""

import random
from pathlib import Path

import pytest

from medfl_ray.errors import BudgetExceeded
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger import PrivacyLedger

DELTA = 1e-5
BUDGET = 1.0
KINDS = ((20.0, 8), (30.0, 4))


def mechanism(sigma: float, steps: int, q: float = 1.0) -> Mechanism:
    return Mechanism(
        noise_multiplier=sigma, sample_rate=q, max_grad_norm=1.0, num_steps=steps, num_patients=40, delta=DELTA
    )


def opened(folder: Path, max_epsilon: float | None = BUDGET) -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, max_epsilon)


def play(folder: Path, seed: int) -> list[Segment]:
    """Run a random schedule and return what was trained; every restart opens the ledger anew."""
    dice = random.Random(seed)
    folder.mkdir()
    ledger = opened(folder)
    trained: list[Segment] = []
    for attempt in range(dice.randint(4, 14)):
        if dice.random() < 0.2:
            ledger = opened(folder)
        sigma, steps = dice.choice(KINDS)
        run_budget = dice.choice([None, BUDGET / 2])
        try:
            reservation = ledger.reserve(
                dice.choice("abc"), dice.randint(1, 3), attempt, mechanism(sigma, steps), run_budget
            )
        except BudgetExceeded:
            continue
        fate = dice.random()
        if fate < 0.6:
            ledger.settle(reservation)
            trained.append(Segment(sigma, 1.0, steps))
        elif fate < 0.8:
            ledger.release(reservation, "called off before training")
    return trained


def check_schedule(folder: Path, seed: int) -> None:
    trained = play(folder, seed)
    spent = opened(folder).spent().epsilon
    assert epsilon_spent(trained, DELTA) <= spent <= BUDGET


def test_random_schedules_never_train_over_budget(tmp_path: Path) -> None:
    for seed in range(15):
        check_schedule(tmp_path / str(seed), seed)


@pytest.mark.ci
def test_a_thousand_random_schedules_never_train_over_budget(tmp_path: Path) -> None:
    for seed in range(1000, 2000):
        check_schedule(tmp_path / str(seed), seed)


@pytest.mark.ci
def test_fifty_rounds_with_restarts_over_three_experiments_cost_what_one_shot_costs(tmp_path: Path) -> None:
    for number in range(50):
        ledger = opened(tmp_path, None)
        ledger.settle(ledger.reserve(f"experiment-{number % 3}", number, 0, mechanism(4.0, 3, q=0.2), None))
    one_shot = epsilon_spent([Segment(4.0, 0.2, 150)], DELTA)
    assert opened(tmp_path, None).spent().epsilon == pytest.approx(one_shot, abs=0.01)


def test_a_failpoint_that_is_not_named_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDFL_FAILPOINT", raising=False)
    failpoint("ledger.reserve.begin")
    monkeypatch.setenv("MEDFL_FAILPOINT", "ledger.reserve.begin:2")
    failpoint("ledger.settle.begin")
    failpoint("ledger.reserve.begin")  # the first of two passages
