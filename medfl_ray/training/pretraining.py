"""Pretraining on made-up images: ordinary training, without patients and therefore without epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from medfl_ray.config_pretrain import PretrainConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.patches import draw_patch
from medfl_ray.data.phantoms.structure_crops import Surroundings, draw_crop
from medfl_ray.errors import ModelError
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import Layout, Vector, flatten, layout_of
from medfl_ray.training.losses import make_loss

NUM_AVERAGED = 0.1  # Share of the last steps whose weights are averaged.


def pretrain(
    config: PretrainConfig,
    structures: tuple[Surroundings, ...],
    device: torch.device,
    progress: Callable[[int, float], None],
) -> tuple[Layout, Vector]:
    """Train a fresh network on crops that are each seen once, and return its layout and weights [P].

    The weights are the mean over the last tenth of the steps. Every crop comes from the seed, the step and its
    place in the batch alone. `progress` gets step and loss.

    Raises:
      ModelError: training diverged.
    """
    training = config.training
    torch.manual_seed(training.seed)
    network = build_network(config.model, 3, 1, config.out_channels, True, config.patch_size).to(device).train()
    loss_of = make_loss(training.loss, "segmentation")
    optimizer = torch.optim.Adam(network.parameters(), training.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / training.steps)))
    )
    first_averaged, mean = int(training.steps * (1 - NUM_AVERAGED)), np.zeros(layout_of(network).size)
    for step, (images, targets) in enumerate(_batches(config, structures)):
        logits = network(images.to(device))
        loss = torch.stack([loss_of(a[None], b[None]) for a, b in zip(logits, targets.to(device), strict=True)]).mean()
        if not torch.isfinite(loss):
            raise ModelError("pretraining diverged: the loss is no longer finite; lower training.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step >= first_averaged:
            mean += (flatten(network) - mean) / (step - first_averaged + 1)
        progress(step + 1, loss.item())
    return layout_of(network), mean.astype(np.float32)


def _batches(config: PretrainConfig, structures: tuple[Surroundings, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every step's crops, the next ones being made up while the network learns from these."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(make_batch, config, structures, 0)
        for step in range(config.training.steps):
            ready, coming = coming, maker.submit(make_batch, config, structures, step + 1)
            yield ready.result()


def make_batch(config: PretrainConfig, structures: tuple[Surroundings, ...], step: int) -> tuple[Tensor, Tensor]:
    """Return one step's images float32 [N, 1, *patch] and targets int64 [N, *patch]."""
    pairs = []
    for position in range(config.training.batch_size):
        rng = np.random.default_rng([config.training.seed & (2**63 - 1), step, position])
        image, classes = draw_crop(structures, config.crops, rng)
        case = PreparedCase("synthetic", "synthetic", image, classes, np.eye(4))
        pairs.append(draw_patch(case, (), config.patch_size, 0.0, rng))
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    return images, torch.from_numpy(np.stack([target for _, target in pairs]))
