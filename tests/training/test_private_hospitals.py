"""Private hospitals that train as one group: each with its own draw, bound, noise and release."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.random import Generator

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.errors import NotFitForDP
from medfl_ray.messages import Mechanism
from medfl_ray.params import norm
from medfl_ray.privacy.noise import GaussianNoise
from medfl_ray.privacy.sampler import PoissonSampler
from medfl_ray.training.grouped import trainer as many_hospitals
from medfl_ray.training.grouped.trainer import GroupedTrainer, HospitalTask
from medfl_ray.training.trainer import LocalJob, Trainer

EDGE = 16
RATE = 0.05
SETTINGS = {"batch_size": 2, "momentum": 0.0, "device": "cpu", "patient_group_size": 4}


class FixedPatients:
    """Patients who give the same patches at every draw, as the random numbers of private training are secret."""

    holdout: tuple[PreparedCase, ...] = ()
    labels = {1: "bright"}  # noqa: RUF012

    def __init__(self, hospital: int, num_patients: int, brightness: float = 1.0) -> None:
        self._hospital, self.num_train_patients, self._brightness = hospital, num_patients, brightness

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.random.default_rng([self._hospital, patient_index]).normal(size=(num_patches, 1, EDGE, EDGE))
        labels = torch.from_numpy((images[:, 0] > 0.5).astype(np.int64))
        return torch.from_numpy(images.astype(np.float32) * self._brightness), labels


def make_trainer(for_dp: bool = True, **training: object) -> Trainer:
    settings = TrainingConfig(**{**SETTINGS, **training})  # type: ignore[arg-type]
    return Trainer(ModelConfig(type="unet2d", features=(4, 8)), settings, "segmentation", 2, 1, 2, (EDGE,) * 2, for_dp)


def mechanism(num_patients: int, steps: int, noise: float = 1.0, clip: float = 1.0, q: float = 1.0) -> Mechanism:
    return Mechanism(
        noise_multiplier=noise,
        sample_rate=q,
        max_grad_norm=clip,
        num_steps=steps,
        num_patients=num_patients,
        delta=1e-5,
    )


def private_task(hospital: int, patients: int, steps: int, **settings: float) -> HospitalTask:
    job = LocalJob(steps, RATE, mechanism(patients, steps, **settings), (hospital,))
    return HospitalTask(FixedPatients(hospital, patients), job)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianNoise, "draw", lambda self, size, std: np.zeros(size))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "training",
    [{}, {"momentum": 0.9}, {"optimizer": "adam", "momentum": 0.9}, {"patches_per_patient": 2}],
    ids=["sgd", "momentum", "adam", "two patches"],
)
def test_without_noise_a_group_learns_what_each_hospital_learns_alone(training: dict[str, object]) -> None:
    trainer = make_trainer(**training)
    weights = trainer.initial_weights(0)
    # The clip norms lie on both sides of what gradients have; numbers of steps and of patients differ.
    tasks = [private_task(i, n, s, clip=c) for i, (n, s, c) in enumerate([(3, 2, 0.2), (1, 3, 50.0), (5, 1, 0.5)])]
    many = GroupedTrainer(trainer, 4)
    assert not many.why_in_turn
    for position, found in many.train(weights, tasks):
        alone = trainer.train(weights, tasks[position].data, tasks[position].job)
        assert norm(found.delta - alone.delta) <= 1e-5 * norm(alone.delta)
        assert found.mean_loss == pytest.approx(alone.mean_loss, rel=1e-5)


@pytest.mark.usefixtures("silent")
def test_one_patient_moves_its_hospital_by_the_bound_and_no_other_hospital() -> None:
    clip = 0.01  # far below any gradient, so that every patient is at the bound
    trainer = make_trainer()
    weights = trainer.initial_weights(0)

    def deltas(extra: int) -> dict[int, np.ndarray]:
        tasks = [private_task(0, 2 + extra, 1, clip=clip), private_task(1, 3, 1, clip=clip)]
        same = mechanism(2, 1, clip=clip)  # the public number of patients is that of either case
        tasks[0] = HospitalTask(tasks[0].data, LocalJob(1, RATE, same, (0,)))
        return {i: outcome.delta for i, outcome in GroupedTrainer(trainer, 3).train(weights, tasks)}

    without, with_one = deltas(0), deltas(1)
    assert norm(with_one[0] - without[0]) == pytest.approx(RATE * clip / 2, rel=1e-3)
    np.testing.assert_allclose(with_one[1], without[1], atol=1e-7 * clip)


def test_every_hospital_has_noise_of_its_own_and_of_the_right_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, num_patients: np.arange(0))
    trainer = make_trainer()
    weights = trainer.initial_weights(0)
    tasks = [private_task(i, 4, 1, noise=2.0, clip=30.0, q=0.5) for i in range(2)]
    first, second = (outcome.delta for _, outcome in GroupedTrainer(trainer, 2).train(weights, tasks))
    expected = RATE * 2.0 * 30.0 / (0.5 * 4)
    size = len(first)
    for delta in (first, second):
        assert delta.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * size))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(size)


def test_a_step_that_draws_nobody_is_noised_and_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, num_patients: np.arange(0))
    trainer = make_trainer()
    outcomes = dict(GroupedTrainer(trainer, 2).train(trainer.initial_weights(0), [private_task(0, 2, 2)] * 2))
    assert all(np.isnan(outcome.mean_loss) and norm(outcome.delta) > 0 for outcome in outcomes.values())


def test_each_hospital_draws_its_own_sample_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def draw(self: PoissonSampler, num_patients: int) -> np.ndarray:
        asked.append(num_patients)
        return np.arange(num_patients)

    monkeypatch.setattr(PoissonSampler, "draw", draw)
    trainer = make_trainer()
    tasks = [private_task(0, 2, 1), private_task(1, 3, 3)]
    list(GroupedTrainer(trainer, 4).train(trainer.initial_weights(0), tasks))
    assert sorted(asked) == [2, 3, 3, 3]  # once per step and none after a hospital's last one


def test_no_group_has_more_members_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = many_hospitals.PrivateHospitals._add

    def add(self: many_hospitals.PrivateHospitals, pairs: Sequence[tuple[int, int]]) -> None:
        seen.append(len(pairs))
        original(self, pairs)

    monkeypatch.setattr(many_hospitals.PrivateHospitals, "_add", add)
    trainer = make_trainer()
    tasks = [private_task(0, 5, 1), private_task(1, 4, 1)]
    list(GroupedTrainer(trainer, 4).train(trainer.initial_weights(0), tasks))
    assert seen == [4, 4, 1]


def test_patient_by_patient_is_what_a_configuration_gets_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedTrainer, "_train_group", None)
    trainer = make_trainer(patient_gradients="single")
    found = dict(GroupedTrainer(trainer, 4).train(trainer.initial_weights(0), [private_task(0, 2, 1)] * 2))
    assert len(found) == 2


def test_a_trainer_without_the_dp_checks_is_refused() -> None:
    trainer = make_trainer(for_dp=False)
    with pytest.raises(NotFitForDP, match="for_dp"):
        list(GroupedTrainer(trainer, 4).train(trainer.initial_weights(0), [private_task(0, 2, 1)]))


def test_patients_are_proven_apart_before_the_first_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: object, make_patient: object) -> None:
        raise NotFitForDP("mixed")

    monkeypatch.setattr("medfl_ray.training.trainer.check_patients_apart", refuse)
    trainer = make_trainer()
    with pytest.raises(NotFitForDP, match="mixed"):
        list(GroupedTrainer(trainer, 4).train(trainer.initial_weights(0), [private_task(0, 2, 1)]))
