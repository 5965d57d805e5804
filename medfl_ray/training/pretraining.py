"""Pretraining on made-up images: ordinary training, without patients and therefore without epsilon."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medfl_ray.config.pretrain import PretrainConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.phantoms.structure_crops import Surroundings, draw_crop
from medfl_ray.data.prepare.patches import draw_patch
from medfl_ray.errors import ModelError
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import Layout, Vector, flatten, layout_of
from medfl_ray.training.losses import make_loss

LAST_SHARE = 0.1  # Share of the steps, at the end, whose weights are averaged.
STEPS_BETWEEN_SAVES = 100


def pretrain(
    config: PretrainConfig,
    structures: tuple[Surroundings, ...],
    device: torch.device,
    progress: Callable[[int, float], None],
    unfinished: Path,
) -> tuple[Layout, Vector]:
    """Train a fresh network on crops that are each seen once, and return its layout and weights [P].

    The weights are the mean over the last tenth of the steps. Every crop comes from the seed, the step and its
    place in the batch alone.

    Args:
      progress: gets step and loss.
      unfinished: file in which the state is kept every 100 steps, and from which the same pretraining goes on.

    Raises:
      ModelError: training diverged.
    """
    training = config.training
    torch.manual_seed(training.seed)
    network = build_network(config.model, 3, 1, config.out_channels, True, config.patch_size).to(device).train()
    loss_of = make_loss(training.loss, "segmentation")
    optimizer = torch.optim.Adam(network.parameters(), training.learning_rate)
    first_averaged = int(training.steps * (1 - LAST_SHARE))
    mean = torch.zeros(layout_of(network).size, dtype=torch.float64)
    done = _resume(unfinished, config, network, optimizer, mean)
    for step, (images, targets) in enumerate(_batches(config, structures, done), start=done):
        logits = network(images.to(device))
        loss = torch.stack([loss_of(a[None], b[None]) for a, b in zip(logits, targets.to(device), strict=True)]).mean()
        if not torch.isfinite(loss):
            raise ModelError("pretraining diverged: the loss is no longer finite; lower training.learning_rate")
        optimizer.param_groups[0]["lr"] = training.learning_rate * _fall(step / training.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step >= first_averaged:
            mean += (torch.from_numpy(flatten(network)) - mean) / (step - first_averaged + 1)
        if (step + 1) % STEPS_BETWEEN_SAVES == 0:
            _save(unfinished, config, network, optimizer, mean, step + 1)
        progress(step + 1, loss.item())
    unfinished.unlink(missing_ok=True)
    return layout_of(network), mean.numpy().astype(np.float32)


def _fall(progress: float) -> float:
    """From 1 down to a fiftieth, as a cosine over the steps."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    path: Path, config: PretrainConfig, network: nn.Module, optimizer: torch.optim.Adam, mean: Tensor, done: int
) -> None:
    state: dict[str, Tensor] = {"mean": mean}
    for name, parameter in network.named_parameters():
        own: dict[str, Any] = optimizer.state[parameter]
        state |= {f"weight/{name}": parameter.detach(), **{f"adam/{name}/{key}": own[key] for key in own}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, temporary, _made_with(config, done))
    temporary.replace(path)


def _resume(path: Path, config: PretrainConfig, network: nn.Module, optimizer: torch.optim.Adam, mean: Tensor) -> int:
    """Take up a saved state, in place, and return the steps done: 0 where there is none of this configuration."""
    try:
        with safe_open(path, "pt") as file:
            noted = file.metadata() or {}
            done = int(noted.get("steps", 0))
            if noted != _made_with(config, done):
                return 0
            mean.copy_(file.get_tensor("mean"))
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(file.get_tensor(f"weight/{name}"))
                    optimizer.state[parameter] = {
                        key: file.get_tensor(f"adam/{name}/{key}").to("cpu" if key == "step" else parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            return done
    except (FileNotFoundError, SafetensorError):
        return 0


def _made_with(config: PretrainConfig, done: int) -> dict[str, str]:
    relevant = config.model_dump_json(exclude={"name": True, "output": True, "crops": {"labelmaps"}})
    return {"config": hashlib.sha256(relevant.encode()).hexdigest(), "steps": str(done)}


def _batches(
    config: PretrainConfig, structures: tuple[Surroundings, ...], done: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the crops of every step to come, the next ones being made up while the network learns from these."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = maker.submit(make_batch, config, structures, done)
        for step in range(done, config.training.steps):
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
