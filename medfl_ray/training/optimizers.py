"""The local optimizer; its state lives for one round."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from medfl_ray.config import TrainingConfig


def make_optimizer(training: TrainingConfig, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """Return a fresh optimizer; `momentum` is the momentum of sgd and beta1 of adam and adamw."""
    if training.optimizer == "sgd":
        return SGD(
            parameters, learning_rate, momentum=training.momentum, weight_decay=training.weight_decay, foreach=True
        )
    adaptive = Adam if training.optimizer == "adam" else AdamW
    return adaptive(parameters, learning_rate, betas=(training.momentum, 0.999), weight_decay=training.weight_decay)
