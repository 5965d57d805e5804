"""Learning rates over the rounds, against hand-computed values."""

from __future__ import annotations

import pytest

from medfl_ray.config.training import TrainingConfig
from medfl_ray.training.schedules import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.4, 0.4, 0.4, 0.4]), ("linear", [0.4, 0.3, 0.2, 0.1]), ("cosine", [0.4, 0.341421, 0.2, 0.058579])],
)
def test_rates_of_four_rounds(schedule: str, expected: list[float]) -> None:
    training = TrainingConfig(learning_rate=0.4, lr_schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(training, number, 4) for number in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)


def test_steps_and_a_warm_up_by_hand() -> None:
    training = TrainingConfig(
        learning_rate=0.4, lr_schedule="step", lr_step_rounds=2, lr_step_factor=0.5, lr_warmup_rounds=1
    )
    rates = [learning_rate(training, number, 5) for number in range(1, 6)]
    assert rates == pytest.approx([0.2, 0.4, 0.2, 0.2, 0.1])


def test_a_warm_up_of_three_rounds_climbs_in_equal_parts() -> None:
    training = TrainingConfig(learning_rate=0.4, lr_warmup_rounds=3)
    rates = [learning_rate(training, number, 5) for number in range(1, 6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
