"""Losses of one patient: every function here sees the patches of a single patient, never a mixed batch.

Shapes: K patches of the patient, L output channels (background is channel 0), S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["dice_ce", "dice", "cross_entropy", "focal"]
PatientLoss = Callable[[Tensor, Tensor], Tensor]

SMOOTH = 1e-5
FOCUS = 2.0


def make_loss(name: LossName, task: Literal["segmentation", "classification"]) -> PatientLoss:
    """Return the loss of one patient: (logits [K, L, *S], targets [K, *S]) -> scalar.

    Classification has logits [K, L] and targets [K], and always uses the cross entropy.
    """
    return cross_entropy if task == "classification" else LOSSES[name]


def loss_of_each(loss: PatientLoss) -> PatientLoss:
    """Return the same loss for M patients at once: (logits [M, K, L, *S], targets [M, K, *S]) -> [M]."""
    return EACH[loss]


def mean_loss(loss: PatientLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over M patients with K patches each: logits [M * K, L, *S], targets [M, K, *S]."""
    if loss is cross_entropy:  # one operation instead of three, which a small network's step would feel
        return functional.cross_entropy(logits, targets.flatten(0, 1))
    return EACH[loss](logits.reshape(*targets.shape[:2], *logits.shape[1:]), targets).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the patient's own voxels, unweighted: a class weight would be fitted over patients."""
    return functional.cross_entropy(logits, targets)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - soft Dice, mean over the labels without background; sums run over all K patches of the patient."""
    probabilities = torch.softmax(logits, dim=1)[:, 1:]
    truth = functional.one_hot(targets, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    axes = [0, *range(2, logits.ndim)]
    overlap = (probabilities * truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    return (1.0 - (2.0 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def dice_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the soft Dice loss and the cross entropy."""
    return dice(logits, targets) + cross_entropy(logits, targets)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss with gamma 2 over all channels (Lin et al. 2017, arXiv:1708.02002), mean over voxels."""
    log_truth = -functional.cross_entropy(logits, targets, reduction="none")
    return (-((1.0 - log_truth.exp()) ** FOCUS) * log_truth).mean()


def cross_entropy_each(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of M patients."""
    per_voxel = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return per_voxel.reshape(len(logits), -1).mean(1)


def dice_each(logits: Tensor, targets: Tensor) -> Tensor:
    """The soft Dice loss of M patients."""
    probabilities = torch.softmax(logits, dim=2)[:, :, 1:]
    truth = functional.one_hot(targets, logits.shape[2]).movedim(-1, 2)[:, :, 1:].to(probabilities.dtype)
    axes = [1, *range(3, logits.ndim)]
    overlap = (probabilities * truth).sum(axes)
    total = probabilities.sum(axes) + truth.sum(axes)
    return (1.0 - (2.0 * overlap + SMOOTH) / (total + SMOOTH)).mean(1)


def dice_ce_each(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of both for M patients."""
    return dice_each(logits, targets) + cross_entropy_each(logits, targets)


def focal_each(logits: Tensor, targets: Tensor) -> Tensor:
    """The focal loss of M patients."""
    log_truth = -functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return (-((1.0 - log_truth.exp()) ** FOCUS) * log_truth).reshape(len(logits), -1).mean(1)


LOSSES: dict[str, PatientLoss] = {"dice_ce": dice_ce, "dice": dice, "cross_entropy": cross_entropy, "focal": focal}
EACH: dict[PatientLoss, PatientLoss] = {
    dice_ce: dice_ce_each,
    dice: dice_each,
    cross_entropy: cross_entropy_each,
    focal: focal_each,
}
