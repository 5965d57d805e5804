"""What a private step does with its patients: each drawn at the charged rate, in secret, and noised even if none is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.random import Generator
from scipy import stats
from torch import Tensor

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.messages import Mechanism
from medfl_ray.training.trainer import LocalJob, Trainer

NUM_PATIENTS, RATE = 10, 0.2


class Register:
    """Patients who write down that they are asked; how many lie on the disk is not the public number."""

    labels, holdout = {1: "a"}, ()

    def __init__(self, num_patients: int = NUM_PATIENTS) -> None:
        self.num_train_patients = num_patients
        self.asked: list[int] = []

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[Tensor, Tensor]:
        self.asked.append(patient_index)
        images = torch.full((num_patches, 1, 8, 8), float(patient_index))
        return images, (images[:, 0] > 4).long()


def mechanism_of(**changes: float) -> Mechanism:
    values = {"noise_multiplier": 1.3, "sample_rate": RATE, "max_grad_norm": 0.7, "num_steps": 1, "delta": 1e-5}
    return Mechanism.model_validate({**values, "num_patients": NUM_PATIENTS, **changes})


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    training = TrainingConfig(device="cpu", momentum=0.0, patient_gradients="single", augment=False)
    return Trainer(ModelConfig(type="unet2d", features=(4, 8)), training, "segmentation", 2, 1, 2, (8, 8), for_dp=True)


def drawn_per_step(trainer: Trainer, num_steps: int, mechanism: Mechanism) -> list[list[int]]:
    """Return who was asked in each step; all steps under one and the same seed key."""
    start, steps = trainer.initial_weights(0), []
    for _ in range(num_steps):
        data = Register()
        trainer.train(start, data, LocalJob(1, 1e-3, mechanism, (0, 0, 0)))
        steps.append(data.asked)
    return steps


def test_patients_are_drawn_as_the_accountant_assumes(trainer: Trainer) -> None:
    """Independently, each with the mechanism's q, so that the sizes of the batches are binomial."""
    steps = drawn_per_step(trainer, 400, mechanism_of())
    assert all(len(set(asked)) == len(asked) for asked in steps)
    num_drawn = sum(map(len, steps))
    assert stats.binomtest(num_drawn, 400 * NUM_PATIENTS, RATE).pvalue > 1e-6
    sizes = [len(asked) for asked in steps]
    expected = stats.binom.pmf(range(6), NUM_PATIENTS, RATE) * 400
    seen = np.bincount(np.minimum(sizes, 5), minlength=6)
    expected[5] = 400 - expected[:5].sum()
    assert stats.chisquare(seen, expected).pvalue > 1e-6


def test_steps_of_one_round_are_drawn_anew(trainer: Trainer) -> None:
    """A shuffled pass asks everybody equally often; Poisson sampling does not, which is what amplification needs."""
    data = Register()
    trainer.train(trainer.initial_weights(0), data, LocalJob(200, 1e-6, mechanism_of(), (0, 0, 0)))
    times = np.bincount(data.asked, minlength=NUM_PATIENTS)
    deviations = ((times - 200 * RATE) ** 2 / (200 * RATE * (1 - RATE))).sum()
    assert stats.chi2.sf(deviations, NUM_PATIENTS) > 1e-6
    assert stats.chi2.cdf(deviations, NUM_PATIENTS) > 1e-6  # too even is no Poisson sample either


def test_the_seed_does_not_tell_who_is_drawn(trainer: Trainer) -> None:
    np.random.seed(0)
    first = drawn_per_step(trainer, 12, mechanism_of(sample_rate=0.5))
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn_per_step(trainer, 12, mechanism_of(sample_rate=0.5)) != first


def test_a_step_that_draws_nobody_touches_nobody_and_is_noised(trainer: Trainer) -> None:
    data, start = Register(), trainer.initial_weights(0)
    outcome = trainer.train(start, data, LocalJob(3, 1.0, mechanism_of(sample_rate=1e-9), (0, 0, 0)))
    assert data.asked == []
    assert outcome.num_steps == 3
    assert np.count_nonzero(outcome.delta) > 0.99 * outcome.delta.size


@pytest.mark.parametrize("changes", [{}, {"noise_multiplier": 4.0}, {"max_grad_norm": 2.0}, {"num_patients": 1000}])
def test_weights_move_by_the_charged_noise(trainer: Trainer, changes: dict[str, float]) -> None:
    """Without patients a step of rate 1 is noise of deviation sigma C / (q N), N the public number."""
    mechanism = mechanism_of(**changes)
    outcome = trainer.train(
        trainer.initial_weights(0), Register(num_patients=0), LocalJob(1, 1.0, mechanism, (0, 0, 0))
    )
    std = mechanism.noise_multiplier * mechanism.max_grad_norm / (RATE * mechanism.num_records)
    size = outcome.delta.size
    assert stats.chi2.sf((outcome.delta.astype(float) ** 2).sum() / std**2, size) > 1e-6
    assert stats.chi2.cdf((outcome.delta.astype(float) ** 2).sum() / std**2, size) > 1e-6
    assert abs(outcome.delta.mean()) < 6 * std / math.sqrt(size)


class OneUnreadable(Register):
    """Patients of whom one turned unreadable, whose patches are no numbers."""

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[Tensor, Tensor]:
        images, targets = super().train_patches(patient_index, num_patches, rng)
        return (
            (torch.full_like(images, math.nan), torch.zeros_like(targets)) if patient_index == 0 else (images, targets)
        )


class Absent(Register):
    """The same patients without that one."""

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[Tensor, Tensor]:
        return super().train_patches(patient_index + 1, num_patches, rng)


@pytest.mark.parametrize("engine", ["single", "grouped"])
def test_hole_a_patient_who_cannot_be_read_adds_nothing_and_moves_nobody(engine: str) -> None:
    training = TrainingConfig(
        device="cpu", momentum=0.0, patient_gradients=engine, patient_group_size=4, augment=False, optimizer="sgd"
    )
    model = ModelConfig(type="unet2d", features=(4, 8))
    trainer = Trainer(model, training, "segmentation", 2, 1, 2, (8, 8), for_dp=True)
    job = LocalJob(1, 1.0, mechanism_of(sample_rate=1.0, noise_multiplier=1e-7), (0, 0, 0))
    start = trainer.initial_weights(0)
    with_one = trainer.train(start, OneUnreadable(), job).delta
    without = trainer.train(start, Absent(NUM_PATIENTS - 1), job).delta
    assert np.isfinite(with_one).all()
    assert float(np.abs(without).max()) > 1e-3
    np.testing.assert_allclose(with_one, without, atol=2e-6)
