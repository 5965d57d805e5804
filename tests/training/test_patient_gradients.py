"""A patient's gradient against plain autograd in float64, and the bound that clipping puts on it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.random import Generator
from torch import Tensor

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import CATALOGUE, build_network
from medfl_ray.training.gradients.patient_gradients import OneAtATime, Patient
from medfl_ray.training.losses import make_loss
from medfl_ray.training.trainer import LocalJob, Trainer

# Edges of the smallest patch on which each 3D network can be tried; the others take 16.
EDGE_3D = {"basic_unet": 16, "unetr": 16, "swin_unetr": 32}
EVERY = [
    pytest.param(
        name, (EDGE_3D.get(name, 16),) * 3 if dims == 3 else (32, 32), marks=[pytest.mark.ci] if dims == 3 else []
    )
    for name, entry in CATALOGUE.items()
    for dims in entry.spatial_dims
]


def network_of(name: str, patch: tuple[int, ...] = (32, 32), **fields: object) -> torch.nn.Module:
    features = {"swin_unetr": (12,), "basic_unet": (4, 4, 4, 4, 4)}.get(name, (4, 8))
    model = ModelConfig.model_validate({"type": name, "features": features, **fields})
    return build_network(model, len(patch), 2, 3, True, patch)


def patients_of(num_patients: int, num_patches: int, task: str, patch: tuple[int, ...] = (32, 32)) -> list[Patient]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_patches,) if task == "classification" else (num_patches, *patch)
    return [
        (
            torch.randn(num_patches, 2, *patch, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, shape, generator=generator),
        )
        for _ in range(num_patients)
    ]


@pytest.mark.parametrize(("name", "patch"), EVERY)
def test_equals_autograd_of_each_patch_in_float64(name: str, patch: tuple[int, ...]) -> None:
    """Cross entropy is a mean over patches, so the patient's gradient is the mean of the patches' gradients."""
    task = "classification" if name == "densenet" else "segmentation"
    network = network_of(name, patch).double()
    loss = make_loss("cross_entropy", task)  # type: ignore[arg-type]
    patients = patients_of(2, 3, task, patch)
    found = [gradient for gradient, _ in OneAtATime(network, loss)(iter(patients))]
    for (images, targets), gradient in zip(patients, found, strict=True):
        for parameter in network.parameters():
            parameter.grad = None
        for image, target in zip(images, targets, strict=True):
            (torch.nn.functional.cross_entropy(network(image[None]), target[None]) / len(images)).backward()
        for mine, parameter in zip(gradient, network.parameters(), strict=True):
            assert (mine - parameter.grad).abs().max() <= 1e-10


class Patients:
    """Random images; patient i's intensities are those of a different scanner, so that gradients differ in size."""

    labels, holdout = {1: "a", 2: "b"}, ()

    def __init__(self, num_patients: int) -> None:
        self.num_train_patients = num_patients

    def train_patches(self, patient_index: int, num_patches: int, rng: Generator) -> tuple[Tensor, Tensor]:
        own = np.random.default_rng(patient_index)
        images = own.normal(0, 10.0**patient_index, (num_patches, 2, 16, 16)).astype(np.float32)
        return torch.from_numpy(images), torch.from_numpy(own.integers(0, 3, (num_patches, 16, 16)))


def almost_noiseless_step(num_patients: int, num_patches: int, max_grad_norm: float) -> np.ndarray:
    """Return the change of one SGD step at learning rate 1, times q N: the clipped sum, but for noise of 1e-12."""
    model = ModelConfig(type="unet2d", features=(4, 8))
    training = TrainingConfig(device="cpu", momentum=0.0, patches_per_patient=num_patches, augment=False)
    trainer = Trainer(model, training, "segmentation", 2, 2, 3, (16, 16), for_dp=True)
    mechanism = Mechanism(
        noise_multiplier=1e-12, sample_rate=1.0, max_grad_norm=max_grad_norm, num_steps=1, num_patients=1, delta=1e-5
    )
    start = trainer.initial_weights(0)
    return -trainer.train(start, Patients(num_patients), LocalJob(1, 1.0, mechanism, ())).delta.astype(np.float64)


@pytest.mark.parametrize("num_patches", [1, 4, 16])
def test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm(num_patches: int) -> None:
    """Add/remove sensitivity of a whole step; float32 weights round the change, hence the tolerance."""
    clip = 0.05
    sums = [almost_noiseless_step(count, num_patches, clip) for count in (1, 2, 3)]
    for smaller, larger in pairwise(sums):
        assert np.linalg.norm(larger - smaller) <= clip * (1 + 1e-5)
    assert np.linalg.norm(sums[1] - sums[0]) > 0.99 * clip


def test_small_gradients_are_not_scaled_up() -> None:
    loose, looser = (almost_noiseless_step(1, 2, clip) for clip in (1e3, 1e4))
    assert np.allclose(loose, looser, atol=1e-6)
    assert np.linalg.norm(loose) < 1e3
