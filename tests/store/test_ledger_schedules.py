"""Many runs, restarts, retries and releases on one data set: the account adds up and the budget holds."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sampling import sampled

from medfl_ray.errors import BudgetExceeded
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import Mechanism
from medfl_ray.privacy import accountant
from medfl_ray.privacy.accountant import Segment, epsilon_spent, renyi_epsilon
from medfl_ray.store.ledger.account import PrivacyLedger

DELTA = 1e-5
BUDGET = 1.0
KINDS = ((20.0, 8), (30.0, 4))


def mechanism(sigma: float, steps: int, q: float = 1.0) -> Mechanism:
    return Mechanism(
        noise_multiplier=sigma, sample_rate=q, max_grad_norm=1.0, num_steps=steps, num_patients=40, delta=DELTA
    )


def opened(folder: Path, max_epsilon: float | None = BUDGET) -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, max_epsilon)


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of durable writes wait for the disk most of the time."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


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
def test_todays_part_of_a_thousand_random_schedules_never_trains_over_budget(quick_folder: Path) -> None:
    for seed in sampled(range(1000, 2000), 4):
        check_schedule(quick_folder / str(seed), seed)


@pytest.mark.long
def test_a_thousand_random_schedules_never_train_over_budget(quick_folder: Path) -> None:
    for seed in range(1000, 2000):
        check_schedule(quick_folder / str(seed), seed)


def test_sampled_steps_are_charged_at_their_rate(tmp_path: Path) -> None:
    ledger = opened(tmp_path, None)
    ledger.settle(ledger.reserve("sampled", 1, 0, mechanism(4.0, 10, q=0.25), None))
    ledger.settle(ledger.reserve("whole", 1, 0, mechanism(20.0, 2), None))
    expected = epsilon_spent([Segment(4.0, 0.25, 10), Segment(20.0, 1.0, 2)], DELTA)
    assert ledger.spent().epsilon == expected
    with pytest.raises(BudgetExceeded):
        opened(tmp_path, expected).reserve("next", 1, 0, mechanism(20.0, 1, q=0.05), None)


def test_a_mechanism_that_changes_between_rounds_costs_what_the_whole_history_costs(tmp_path: Path) -> None:
    history = [Segment(6.0, 0.2, 10), Segment(8.0, 0.2, 10), Segment(6.0, 0.1, 30), Segment(6.0, 0.2, 5)]
    for number, (sigma, q, steps) in enumerate(history):
        ledger = opened(tmp_path, None)
        ledger.settle(ledger.reserve(f"experiment-{number % 2}", number, 0, mechanism(sigma, steps, q), None))
    assert opened(tmp_path, None).spent().epsilon == epsilon_spent(history, DELTA)


@pytest.mark.ci
def test_a_thousand_hospitals_with_one_history_are_accounted_once(
    quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A charge, its settlement and a look at what was spent, at every hospital."""
    accountings: list[tuple[Segment, ...]] = []

    def counted(history: tuple[Segment, ...], delta: float) -> float:
        accountings.append(history)
        return renyi_epsilon(history, delta)

    accountant._epsilon.cache_clear()
    monkeypatch.setattr(accountant, "renyi_epsilon", counted)  # the first thing that every sampled history needs
    for number in range(1000):
        (quick_folder / str(number)).mkdir()
        ledger = opened(quick_folder / str(number))
        ledger.settle(ledger.reserve("job", 1, 0, mechanism(8.0, 5, q=0.1), BUDGET))
        assert ledger.spent().epsilon > 0
    assert accountings == [(Segment(8.0, 0.1, 5),)]


@pytest.mark.ci
def test_fifty_rounds_with_restarts_over_three_experiments_cost_what_one_shot_costs(tmp_path: Path) -> None:
    for number in range(50):
        ledger = opened(tmp_path, None)
        ledger.settle(ledger.reserve(f"experiment-{number % 3}", number, 0, mechanism(4.0, 3, q=0.2), None))
    one_shot = epsilon_spent([Segment(4.0, 0.2, 150)], DELTA)
    assert opened(tmp_path, None).spent().epsilon == pytest.approx(one_shot, abs=0.01)


def test_only_the_named_passage_of_a_failpoint_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, signal: killed.append(process))
    monkeypatch.delenv("MEDFL_FAILPOINT", raising=False)
    failpoint("ledger.reserve.begin")
    monkeypatch.setenv("MEDFL_FAILPOINT", "ledger.reserve.begin:2")
    failpoint("ledger.settle.begin")
    failpoint("ledger.reserve.begin")  # the first of two passages
    assert killed == []
    failpoint("ledger.reserve.begin")
    assert killed == [os.getpid()]
