"""Losses against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss

from medfl_ray.training.losses import cross_entropy, dice, dice_ce, focal, make_loss


def test_even_odds() -> None:
    logits, targets = torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])
    assert cross_entropy(logits, targets).item() == pytest.approx(math.log(2))
    # overlap 2 * 0.5 = 1 of sums 4 * 0.5 + 2 = 4
    assert dice(logits, targets).item() == pytest.approx(1 - 2 / 4, abs=1e-5)
    assert dice_ce(logits, targets).item() == pytest.approx(0.5 + math.log(2), abs=1e-5)
    assert focal(logits, targets).item() == pytest.approx(0.25 * math.log(2))


def test_dice_runs_over_all_patches_of_the_patient() -> None:
    logits = torch.full((2, 2, 2), -20.0)
    logits[:, 1] = 20.0
    targets = torch.tensor([[1, 1], [0, 0]])
    assert dice(logits, targets).item() == pytest.approx(1 - 2 * 2 / (4 + 2), abs=1e-5)


def test_agrees_with_monai() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    targets = torch.randint(0, 4, (3, 5, 6), generator=generator)
    settings = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    assert dice(logits, targets).item() == pytest.approx(
        DiceLoss(**settings)(logits, targets[:, None]).item(), abs=1e-5
    )
    reference = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)(logits, targets[:, None]) * 4
    assert focal(logits, targets).item() == pytest.approx(reference.item(), rel=1e-5)


def test_classification_always_uses_the_cross_entropy() -> None:
    assert make_loss("dice_ce", "classification") is cross_entropy
    assert make_loss("dice", "segmentation") is dice
