"""Hospitals trained as groups learn exactly what each would have learned alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.random import Generator

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.errors import LabelError
from medfl_ray.params import norm
from medfl_ray.training.grouped.trainer import GroupedTrainer, HospitalTask
from medfl_ray.training.losses import EACH, LOSSES
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome, Pull
from medfl_ray.training.trainer import Trainer

NETWORKS = [
    ("unet2d", 2, (4, 8)),
    ("unet3d", 3, (4, 8)),
    ("basic_unet", 2, (4, 4, 4, 4, 4)),
    ("segresnet", 2, (8, 16)),
    ("dynunet", 2, (4, 8)),
    ("attention_unet", 2, (4, 8)),
    ("unetr", 2, (4, 8)),
    ("swin_unetr", 2, (12,)),
]
EDGE = 32


class NoisePatients:
    """Patients of random images; a hospital's number is all that it is."""

    holdout: tuple[PreparedCase, ...] = ()
    labels = {1: "bright"}  # noqa: RUF012

    def __init__(self, hospital: int, num_patients: int, spatial_dims: int = 2, edge: int = EDGE) -> None:
        self._hospital, self.num_train_patients = hospital, num_patients
        self._shape = (edge,) * spatial_dims

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        own = np.random.default_rng([self._hospital, patient_index])
        images = own.normal(size=(num_patches, 1, *self._shape)) + rng.normal(scale=0.1)
        return torch.from_numpy(images.astype(np.float32)), torch.from_numpy((images[:, 0] > 0.5).astype(np.int64))


def make_trainer(
    name: str = "unet2d", dims: int = 2, features: tuple[int, ...] = (4, 8), **training: object
) -> Trainer:
    settings = {"batch_size": 3, "learning_rate": 0.05, "device": "cpu", **training}
    model = ModelConfig(type=name, features=features, spatial_dims=dims)  # type: ignore[arg-type]
    patch = (EDGE if dims == 2 else 16,) * dims
    return Trainer(model, TrainingConfig(**settings), "segmentation", dims, 1, 2, patch, False)  # type: ignore[arg-type]


def tasks(steps: tuple[int, ...], sizes: tuple[int, ...], dims: int = 2) -> list[HospitalTask]:
    return [
        HospitalTask(NoisePatients(i, size, dims, EDGE if dims == 2 else 16), LocalJob(todo, 0.05, None, (0, 1, i)))
        for i, (todo, size) in enumerate(zip(steps, sizes, strict=True))
    ]


def changed(todo: list[HospitalTask], start: np.ndarray | None = None, **job: object) -> list[HospitalTask]:
    return [HospitalTask(task.data, replace(task.job, **job), start) for task in todo]


def alone(trainer: Trainer, weights: np.ndarray, todo: list[HospitalTask]) -> list[LocalOutcome]:
    return [trainer.train(weights if task.start is None else task.start, task.data, task.job) for task in todo]


def assert_same(found: dict[int, LocalOutcome], expected: list[LocalOutcome]) -> None:
    assert sorted(found) == list(range(len(expected)))
    for i, one in enumerate(expected):
        assert norm(found[i].delta - one.delta) <= 1e-4 * norm(one.delta)
        assert found[i].mean_loss == pytest.approx(one.mean_loss, rel=1e-4)
        assert found[i].num_steps == one.num_steps


@pytest.mark.parametrize(("name", "dims", "features"), NETWORKS)
def test_every_network_gives_what_each_hospital_gets_alone(name: str, dims: int, features: tuple[int, ...]) -> None:
    trainer = make_trainer(name, dims, features, momentum=0.0)
    weights = trainer.initial_weights(0)
    todo = tasks((2, 1, 2, 1), (4, 2, 3, 5), dims)
    many = GroupedTrainer(trainer, 3)
    assert (many.group_size == 1) == (name in ("unetr", "swin_unetr"))
    assert bool(many.why_in_turn) == (many.group_size == 1)
    assert_same(dict(many.train(weights, todo)), alone(trainer, weights, todo))


class ClassifiedPatients(NoisePatients):
    """Patients of random images with one class each."""

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, _ = super().train_patches(patient_index, num_patches, rng)
        return images, torch.full((num_patches,), patient_index % 2)


def test_a_classifier_gives_what_each_hospital_gets_alone() -> None:
    settings = TrainingConfig(batch_size=3, momentum=0.0, device="cpu", loss="cross_entropy", patches_per_patient=2)
    model = ModelConfig(type="densenet", features=(4, 8))
    trainer = Trainer(model, settings, "classification", 2, 1, 2, (EDGE, EDGE), False)
    weights = trainer.initial_weights(0)
    todo = [HospitalTask(ClassifiedPatients(i, n), LocalJob(2, 0.05, None, (0, 1, i))) for i, n in enumerate((4, 2, 3))]
    many = GroupedTrainer(trainer, 3)
    assert not many.why_in_turn
    assert_same(dict(many.train(weights, todo)), alone(trainer, weights, todo))


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adamw", "weight_decay": 0.01},
        {"patches_per_patient": 2, "loss": "dice"},
        {"loss": "focal"},
        {"patient_order": "listed", "loss": "cross_entropy"},
    ],
    ids=["sgd", "adamw", "two patches", "focal", "listed"],
)
def test_optimizer_loss_and_order_are_each_hospitals_own(training: dict[str, object]) -> None:
    trainer = make_trainer(**training)
    weights = trainer.initial_weights(0)
    todo = tasks((4, 2, 3, 3, 1), (7, 1, 4, 3, 2))
    assert_same(dict(GroupedTrainer(trainer, 4).train(weights, todo)), alone(trainer, weights, todo))


def test_the_group_size_does_not_change_a_hospital() -> None:
    trainer = make_trainer()
    weights = trainer.initial_weights(0)
    todo = tasks((2,) * 6, (3,) * 6)
    pairs, all_six = (dict(GroupedTrainer(trainer, size).train(weights, todo)) for size in (2, 6))
    assert_same(pairs, [all_six[i] for i in range(6)])


def test_a_pull_acts_on_each_hospital() -> None:
    trainer = make_trainer(momentum=0.0)
    weights = trainer.initial_weights(0)
    todo = tasks((3, 3), (3, 3))
    free = dict(GroupedTrainer(trainer, 2).train(weights, todo))
    held = dict(GroupedTrainer(trainer, 2).train(weights, changed(todo, pull=Pull(15.0))))
    for i in range(2):
        assert 0 < norm(held[i].delta) < 0.8 * norm(free[i].delta)


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_proximal_step_is_the_hand_computed_one(group_size: int) -> None:
    trainer, mu, rate = make_trainer(momentum=0.0), 2.0, 0.05
    weights = trainer.initial_weights(0)
    todo = tasks((2,), (2,))
    many = GroupedTrainer(trainer, group_size)
    (_, first), *_ = many.train(weights, tasks((1,), (2,)))
    moved = weights + first.delta
    # The second step alone, from where the first one led, on what the hospital draws second.
    (_, both), *_ = many.train(weights, todo)
    (_, held), *_ = many.train(weights, changed(todo, pull=Pull(mu)))
    np.testing.assert_allclose(held.delta, both.delta - rate * mu * (moved - weights), atol=2e-6)


@pytest.mark.parametrize("group_size", [1, 3])
def test_an_offset_moves_a_step_by_the_learning_rate_times_it(group_size: int) -> None:
    trainer, rate = make_trainer(momentum=0.0), 0.05
    weights = trainer.initial_weights(0)
    todo = tasks((1, 1, 1), (2, 2, 2))
    offsets = [np.full_like(weights, 0.1 * (i + 1)) for i in range(3)]
    pulled = [changed([task], pull=Pull(offset=own))[0] for task, own in zip(todo, offsets, strict=True)]
    found = dict(GroupedTrainer(trainer, group_size).train(weights, pulled))
    for i, one in enumerate(alone(trainer, weights, todo)):
        np.testing.assert_allclose(found[i].delta, one.delta - rate * offsets[i], atol=2e-6)


def test_hospitals_with_starts_pulls_and_frozen_tensors_of_their_own_learn_as_alone() -> None:
    trainer = make_trainer()
    weights = trainer.initial_weights(0)
    rng = np.random.default_rng(1)
    frozen = frozenset(trainer.layout.names[:3])
    todo = []
    for i, task in enumerate(tasks((3, 2, 1), (4, 2, 3))):
        start, centre, offset = (weights + rng.normal(0, 0.01, weights.shape).astype(np.float32) for _ in range(3))
        pull = (None, Pull(0.5, centre), Pull(0.2, centre, offset - weights))[i]
        todo += changed([task], None if i == 0 else start, pull=pull, frozen=frozen)
    expected = alone(trainer, weights, todo)
    assert_same(dict(GroupedTrainer(trainer, 3).train(weights, todo)), expected)
    size = sum(parameter.numel() for parameter in list(trainer.network.parameters())[:3])
    for one in expected:
        assert not one.delta[:size].any()
        assert one.delta[size:].any()


def test_a_label_beyond_the_network_is_refused() -> None:
    class Wrong(NoisePatients):
        def train_patches(self, patient_index: int, num_patches: int, rng: Generator):  # type: ignore[no-untyped-def]
            images, targets = super().train_patches(patient_index, num_patches, rng)
            return images, targets + 5

    trainer = make_trainer()
    with pytest.raises(LabelError):
        list(
            GroupedTrainer(trainer, 2).train(
                trainer.initial_weights(0), [HospitalTask(Wrong(0, 2), LocalJob(1, 0.1, None, (0,)))]
            )
        )


def test_dropout_is_drawn_by_each_hospital_alone() -> None:
    model = ModelConfig(type="unet2d", features=(4, 8), dropout=0.2)
    trainer = Trainer(model, TrainingConfig(device="cpu"), "segmentation", 2, 1, 2, (EDGE, EDGE), False)
    assert "drops units out" in GroupedTrainer(trainer, 4).why_in_turn


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_loss_of_each_is_the_loss_of_one(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    targets = torch.randint(0, 4, (3, 2, 5, 6))
    one = torch.stack([LOSSES[name](own, truth) for own, truth in zip(logits, targets, strict=True)])
    torch.testing.assert_close(EACH[LOSSES[name]](logits, targets), one)
