"""What is trained: frozen weights stay, both engines agree, and noise falls on trained numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import to_tensors
from medfl_ray.training.gradients.patient_gradients import InGroups, OneAtATime
from medfl_ray.training.losses import make_loss
from medfl_ray.training.trained_space import SMALL, freeze_the_rest
from medfl_ray.training.trainer import LocalJob, Trainer

SUBSETS = ("all", "last", "norm", "low_rank")
PATCH = (16, 16)


class Noise:
    """Three patients of random images and labels."""

    labels, holdout, num_train_patients = {1: "a"}, (), 3

    def train_patches(self, patient_index: int, num_patches: int, rng: object) -> tuple[torch.Tensor, torch.Tensor]:
        return patient(patient_index, num_patches)


def patient(number: int, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(num_patches, 1, *PATCH, generator=generator)
    return images, torch.randint(0, 2, (num_patches, *PATCH), generator=generator)


def trainer_of(subset: str, **changes: object) -> Trainer:
    fields = {"trainable": subset, "low_rank": 2, "device": "cpu", "momentum": 0.0, "batch_size": 3, **changes}
    model = ModelConfig(type="unet2d", features=(8, 16))
    return Trainer(model, TrainingConfig(**fields), "segmentation", 2, 1, 2, PATCH, True)  # type: ignore[arg-type]


def changed(trainer: Trainer, job: LocalJob) -> dict[str, np.ndarray]:
    outcome = trainer.train(trainer.initial_weights(0), Noise(), job)
    return {name: delta for name, delta in to_tensors(outcome.delta, trainer.layout).items() if delta.any()}


PLAIN = LocalJob(2, 0.1, None, (0, 0, 0))
PRIVATE = LocalJob(
    2,
    0.1,
    Mechanism(noise_multiplier=1.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=3, delta=1e-5),
    (0, 0, 0),
)


@pytest.mark.parametrize("job", [PLAIN, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_weights_move_by_exactly_nothing(job: LocalJob, optimizer: str) -> None:
    last = changed(trainer_of("last", optimizer=optimizer, weight_decay=0.1), job)
    assert {name.rpartition(".")[0] for name in last} == {"model.2.conv"}
    norm = changed(trainer_of("norm", optimizer=optimizer, weight_decay=0.1), job)
    large = {name for name, delta in norm.items() if delta.size >= SMALL}
    assert not large
    assert {"model.0.adn.N.weight", "model.0.adn.N.bias", "model.0.conv.bias"} <= set(norm)


@pytest.mark.parametrize("subset", SUBSETS)
def test_both_engines_give_the_same_gradients(subset: str) -> None:
    network = build_network(ModelConfig(type="unet2d", features=(8, 16)), 2, 1, 2, True, PATCH).double()
    space = freeze_the_rest(network, subset, 2, torch.zeros(1, 1, *PATCH, dtype=torch.float64))  # type: ignore[arg-type]
    loss = make_loss("dice_ce", "segmentation")
    patients = [(images.double(), targets) for images, targets in (patient(i, 2) for i in range(3))]
    single = [space.narrow(gradient) for gradient, _ in OneAtATime(network, loss)(iter(patients))]
    grouped = [space.narrow(gradient) for gradient, _ in InGroups(network, loss, group_size=2)(iter(patients))]
    for own, other in zip(single, grouped, strict=True):
        assert sum(part.numel() for part in own) == space.size
        for part, same in zip(own, other, strict=True):
            assert torch.allclose(part, same, rtol=1e-9, atol=1e-12)


def test_the_subsets_grow() -> None:
    sizes = [trainer_of(subset)._space.size for subset in ("norm", "low_rank", "all")]
    assert sizes == sorted(set(sizes))
    whole = sum(p.numel() for p in trainer_of("all").network.parameters())
    assert sizes[-1] == whole


def test_low_rank_is_the_chain_rule_of_its_factor() -> None:
    """The gradient of B in W + B A is what narrowing the gradient of W gives, and widening B gives B A."""
    network = torch.nn.Sequential(torch.nn.Conv2d(40, 30, 1)).double()
    image = torch.randn(1, 40, 3, 3, dtype=torch.float64)
    space = freeze_the_rest(network, "low_rank", 3, image)
    weight = network[0].weight
    basis = next(basis for basis in space.bases if basis is not None)
    factor = torch.zeros(30, 3, dtype=torch.float64, requires_grad=True)
    changed_weight = weight.detach() + (factor @ basis).view_as(weight)
    torch.nn.functional.conv2d(image, changed_weight).square().sum().backward()
    gradient = torch.autograd.grad(
        torch.nn.functional.conv2d(image, weight).square().sum(), space.parameters, allow_unused=True
    )
    narrowed = space.narrow([g if g is not None else torch.zeros(30) for g in gradient])
    assert factor.grad is not None
    assert torch.allclose(narrowed[0], factor.grad, rtol=1e-10)
    flat = torch.randn(space.size, dtype=torch.float64)
    assert torch.allclose(space.widen(flat)[0].view(30, 40), flat[:90].view(30, 3) @ basis)


def test_low_rank_changes_stay_in_the_fixed_directions() -> None:
    """Plain and private steps alike: a change outside of them would differ from hospital to hospital in rank."""
    for job in (PLAIN, PRIVATE):
        trainer = trainer_of("low_rank")
        deltas = changed(trainer, job)
        names = dict(zip(map(id, trainer.network.parameters()), trainer.layout.names, strict=True))
        for parameter, basis in zip(trainer._space.parameters, trainer._space.bases, strict=True):
            if basis is not None:
                delta = torch.from_numpy(deltas[names[id(parameter)]]).double().flatten(1)
                assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 2
                assert torch.allclose(delta @ basis.T @ basis, delta, atol=1e-6)


def test_noise_falls_on_trained_numbers_alone() -> None:
    """Without a patient's gradient, a step is noise of standard deviation sigma C / (q N) per trained number."""

    class Nobody(Noise):
        num_train_patients = 0

    trainer = trainer_of("norm")
    job = LocalJob(1, 1.0, PRIVATE.mechanism, (0, 0, 0))
    delta = trainer.train(trainer.initial_weights(0), Nobody(), job).delta
    moved = delta[delta != 0]
    assert len(moved) == trainer._space.size
    assert 0.8 / 3 < moved.std() < 1.2 / 3
