"""The trainer learns, repeats itself without DP, and moves by noise alone when no patient is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.random import Generator

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.errors import ConfigError, LabelError, ModelError, NotFitForDP
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import flatten, load_into
from medfl_ray.training.gradients.patient_gradients import forward
from medfl_ray.training.scoring.evaluation import summarise
from medfl_ray.training.trainer import LocalJob, Trainer, choose_device

PATCH = (16, 16)


class DiscPatients:
    """Patients with a bright disc at a random place: image [1, 32, 32], label 1 inside the disc."""

    labels = {1: "disc"}  # noqa: RUF012

    def __init__(self, num_patients: int = 8, num_holdout: int = 4, task: str = "segmentation") -> None:
        rng = np.random.default_rng(7)
        cases = [_disc(rng, index, task) for index in range(num_patients + num_holdout)]
        self._train, self.holdout = cases[:num_patients], cases[num_patients:]
        self.num_train_patients = num_patients

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        case = self._train[patient_index]
        corners = rng.integers(0, 17, size=(num_patches, 2))
        window = [(slice(None), slice(y, y + 16), slice(x, x + 16)) for y, x in corners]
        if isinstance(case.label, int):
            return torch.from_numpy(case.image)[None].repeat(num_patches, 1, 1, 1), torch.full(
                (num_patches,), case.label
            )
        images = np.stack([case.image[w] for w in window])
        targets = np.stack([case.label[w[1:]] for w in window])  # type: ignore[index]
        return torch.from_numpy(images), torch.from_numpy(targets.astype(np.int64))


class WholeImages:
    """The same patients, each with the whole image [1, 1, 32, 32] as its one patch."""

    def __init__(self, patients: DiscPatients) -> None:
        self._cases, self.labels, self.holdout = patients._train, patients.labels, patients.holdout
        self.num_train_patients = patients.num_train_patients

    def train_patches(self, patient_index: int, num_patches: int, rng: object) -> tuple[torch.Tensor, torch.Tensor]:
        case = self._cases[patient_index]
        return torch.from_numpy(case.image)[None], torch.from_numpy(case.label.astype(np.int64))[None]  # type: ignore[union-attr]


def _disc(rng: Generator, index: int, task: str) -> PreparedCase:
    y, x = np.mgrid[:32, :32]
    centre = rng.uniform(10, 22, 2)
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 36
    present = task == "segmentation" or index % 2 == 0
    image = (2.0 * (inside & present) + rng.normal(0, 0.3, (32, 32))).astype(np.float32)[None]
    label = int(present) if task == "classification" else inside.astype(np.uint8)
    return PreparedCase(f"p{index}", f"c{index}", image, label, np.eye(4), (1.0, 1.0))


def make_trainer(task: str = "segmentation", for_dp: bool = False, **training: object) -> Trainer:
    settings = {"batch_size": 4, "learning_rate": 0.05, "device": "cpu", **training}
    kind = "unet2d" if task == "segmentation" else "densenet"
    model = ModelConfig(type=kind, features=(8, 16))
    return Trainer(model, TrainingConfig(**settings), task, 2, 1, 2, PATCH, for_dp)  # type: ignore[arg-type]


def mechanism(sample_rate: float = 0.5, noise_multiplier: float = 0.5) -> Mechanism:
    return Mechanism(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        max_grad_norm=1.0,
        num_steps=2,
        num_patients=8,
        delta=1e-5,
    )


def plain(num_steps: int, seed: int = 0) -> LocalJob:
    return LocalJob(num_steps, 0.05, None, (seed, 0, 0))


def test_learns_to_segment() -> None:
    trainer, data = make_trainer(patches_per_patient=2), DiscPatients()
    start = trainer.initial_weights(0)
    before = summarise(trainer.evaluate(start, data))["dice"]
    outcome = trainer.train(start, data, plain(60))
    after = summarise(trainer.evaluate(start + outcome.delta, data))
    assert before < 0.6
    assert after["dice"] == after["dice/disc"] > 0.85
    assert outcome.num_steps == 60
    assert outcome.delta.dtype == np.float32


def test_learns_to_classify() -> None:
    trainer, data = make_trainer("classification"), DiscPatients(16, 12, task="classification")
    start = trainer.initial_weights(0)
    outcome = trainer.train(start, data, plain(60))
    summary = summarise(trainer.evaluate(start + outcome.delta, data))
    assert summary["auc"] > 0.9
    assert trainer.predict(start, data.holdout[0]).shape == ()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_same_seed_gives_the_same_bits(optimizer: str) -> None:
    data = DiscPatients()
    results = []
    for seed in (3, 3, 4):
        trainer = make_trainer(optimizer=optimizer)
        torch.rand(5)
        results.append(trainer.train(trainer.initial_weights(0), data, plain(3, seed)).delta)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exact_training_has_the_bits_of_a_plain_loop(momentum: float) -> None:
    settings = TrainingConfig(
        batch_size=4, momentum=momentum, optimizer="sgd", device="cpu", loss="cross_entropy", patient_order="listed"
    )
    model = ModelConfig(type="basic_unet", features=(8, 8, 16, 16, 16))
    data, edge = DiscPatients(), (32, 32)
    trainer = Trainer(model, settings, "segmentation", 2, 1, 2, edge, False, exact=True)
    usual = Trainer(model, settings, "segmentation", 2, 1, 2, edge, False)
    whole = WholeImages(data)
    start = trainer.initial_weights(0)
    found, quick = (one.train(start, whole, plain(4)).delta for one in (trainer, usual))

    network = build_network(model, 2, 1, 2, False, edge).train()
    load_into(network, start)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=momentum)
    for step in range(4):
        images, targets = zip(*(whole.train_patches(4 * (step % 2) + i, 1, None) for i in range(4)), strict=True)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(torch.cat(images)), torch.cat(targets)).backward()
        optimizer.step()
    expected = flatten(network) - start
    assert np.array_equal(found, expected)
    assert not np.array_equal(quick, expected)
    assert np.linalg.norm(quick - expected) < 1e-4 * np.linalg.norm(expected)


def test_dropout_follows_the_seed_and_leaves_torch_alone() -> None:
    data, model = DiscPatients(), ModelConfig(type="unet2d", features=(8, 16), dropout=0.5)
    trainer = Trainer(model, TrainingConfig(device="cpu"), "segmentation", 2, 1, 2, PATCH, False)
    start = trainer.initial_weights(0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trainer.train(start, data, plain(2)).delta
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, trainer.train(start, data, plain(2)).delta)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, second = make_trainer(), make_trainer()
    assert np.array_equal(first.initial_weights(5), second.initial_weights(5))
    assert not np.array_equal(first.initial_weights(5), first.initial_weights(6))


def test_dp_step_without_patients_moves_by_noise() -> None:
    trainer, data = make_trainer(for_dp=True), DiscPatients()
    start = trainer.initial_weights(0)
    job = LocalJob(1, 0.1, mechanism(sample_rate=1e-9), (0, 0, 0))
    first, second = trainer.train(start, data, job), trainer.train(start, data, job)
    assert np.isnan(first.mean_loss)
    assert np.count_nonzero(first.delta) > 0.99 * first.delta.size
    assert not np.array_equal(first.delta, second.delta)


def test_dp_ignores_the_seed() -> None:
    trainer, data = make_trainer(for_dp=True), DiscPatients()
    start = trainer.initial_weights(0)
    job = LocalJob(2, 0.1, mechanism(sample_rate=1.0), (1, 1, 1))
    assert not np.array_equal(trainer.train(start, data, job).delta, trainer.train(start, data, job).delta)


def test_dp_learns_with_little_noise() -> None:
    trainer, data = make_trainer(for_dp=True, patches_per_patient=2), DiscPatients()
    start = trainer.initial_weights(0)
    job = LocalJob(80, 0.2, mechanism(sample_rate=0.9, noise_multiplier=1e-3), (0, 0, 0))
    outcome = trainer.train(start, data, job)
    assert summarise(trainer.evaluate(start + outcome.delta, data))["dice"] > 0.8


def test_mechanism_needs_a_trainer_built_for_dp() -> None:
    trainer = make_trainer()
    with pytest.raises(NotFitForDP, match="for_dp=True"):
        trainer.train(trainer.initial_weights(0), DiscPatients(), LocalJob(1, 0.1, mechanism(), (0, 0, 0)))


def test_label_above_the_output_channels_is_named() -> None:
    class Wrong(DiscPatients):
        def train_patches(
            self, patient_index: int, num_patches: int, rng: Generator
        ) -> tuple[torch.Tensor, torch.Tensor]:
            images, targets = super().train_patches(patient_index, num_patches, rng)
            return images, targets + 4

    trainer = make_trainer()
    with pytest.raises(LabelError, match=r"out_channels to [56]"):
        trainer.train(trainer.initial_weights(0), Wrong(), plain(1))


def test_divergence_is_said() -> None:
    trainer = make_trainer()
    with pytest.raises(ModelError, match="diverged"):
        trainer.train(trainer.initial_weights(0), DiscPatients(), LocalJob(8, 1e30, None, (0, 0, 0)))


def test_mixed_precision_trains() -> None:
    trainer, data = make_trainer(mixed_precision=True), DiscPatients()
    outcome = trainer.train(trainer.initial_weights(0), data, plain(4))
    assert np.isfinite(outcome.delta).all()


def test_missing_device_is_said() -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="does not have"):
            choose_device("cuda")


def test_mixed_precision_stays_near_float32_and_keeps_the_weights_in_float32():
    data, outcomes = Volumes(), {}
    for mixed in (False, True):
        training = TrainingConfig(batch_size=2, loss="cross_entropy", device="cpu", mixed_precision=mixed)
        model = ModelConfig(type="basic_unet", features=(8, 8, 8, 8, 8))
        trainer = Trainer(model, training, "segmentation", 3, 1, 2, (32, 32, 32), False)
        weights = trainer.initial_weights(3)
        outcomes[mixed] = trainer.train(weights, data, LocalJob(2, 0.05, None, (1, 1, 0)))
        assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}
        assert outcomes[mixed].delta.dtype == np.float32
    full, rough = outcomes[False].delta, outcomes[True].delta
    assert 0 < np.linalg.norm(rough - full) < 0.05 * np.linalg.norm(full)


def test_volumes_are_trained_as_a_plain_loop_does():
    data = Volumes()
    training = TrainingConfig(
        batch_size=2, loss="cross_entropy", device="cpu", patient_order="listed", optimizer="sgd", momentum=0.0
    )
    model = ModelConfig(type="basic_unet", features=(8, 8, 8, 8, 8))
    trainer = Trainer(model, training, "segmentation", 3, 1, 2, (32, 32, 32), False)
    weights = trainer.initial_weights(3)
    found = trainer.train(weights, data, LocalJob(2, 0.05, None, (1, 1, 0))).delta
    network = build_network(model, 3, 1, 2, False, (32, 32, 32))
    load_into(network, weights)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for start in (0, 2):
        images, targets = (torch.cat(parts) for parts in zip(*data.patients[start : start + 2], strict=True))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
    expected = flatten(network) - weights
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    assert trainer.predict(weights + found, Volumes.case()).shape == (32, 32, 32)


class Volumes:
    """Four patients, each one volume with a bright half."""

    labels = {1: "half"}  # noqa: RUF012
    holdout: tuple[PreparedCase, ...] = ()
    num_train_patients = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        truth = torch.zeros(1, 32, 32, 32, dtype=torch.int64)
        truth[:, 16:] = 1
        self.patients = [(truth[:, None] + torch.randn(1, 1, 32, 32, 32, generator=generator), truth) for _ in range(4)]

    @staticmethod
    def case() -> PreparedCase:
        image = np.zeros((1, 32, 32, 32), dtype=np.float32)
        return PreparedCase("p", "c", image, None, np.eye(4), (1.0, 1.0, 1.0))

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return self.patients[patient_index]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_narrow_images_in_bfloat16_is_near_the_one_in_float32(transposed):
    """The lowest level of a U-Net, where oneDNN leaves parts of a bfloat16 gradient unwritten."""
    kind = torch.nn.ConvTranspose3d if transposed else torch.nn.Conv3d
    layer, images = kind(8, 8, 3, padding=1), torch.randn(2, 8, 2, 2, 2, requires_grad=True)
    gradients = []
    for mixed_precision in (False, True, True, True):
        loss = forward(layer, images, mixed_precision).square().mean()
        gradients.append(torch.autograd.grad(loss, layer.weight)[0].float())
    for rough in gradients[1:]:
        assert (rough - gradients[0]).norm() < 0.02 * gradients[0].norm()
