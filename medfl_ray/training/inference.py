"""Whole-case inference: sliding windows over padded images, in evaluation mode.

Shapes: C channels, L output channels, S voxels per axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl_ray.errors import ModelError

OVERLAP = 0.25
WINDOWS_AT_ONCE = 4


def segment(network: nn.Module, image: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """Return logits [L, *S] of an image [C, *S], from windows of the size that the network was trained on.

    An image smaller than the patch is padded with zeros and cropped back.
    """
    from monai.inferers.utils import sliding_window_inference

    logits = sliding_window_inference(
        image[None], patch_size, WINDOWS_AT_ONCE, network, overlap=OVERLAP, mode="gaussian", padding_mode="constant"
    )
    if not isinstance(logits, Tensor):
        raise ModelError(
            "the network has several outputs; a segmentation network has one, so switch deep supervision off"
        )
    return logits[0]


def classify(network: nn.Module, image: Tensor, smallest: tuple[int, ...]) -> Tensor:
    """Return class probabilities [L] of a whole image [C, *S], padded with zeros all round to the smallest size."""
    shortfall = [max(0, low - edge) for low, edge in zip(smallest, image.shape[1:], strict=True)]
    padding = [amount for missing in reversed(shortfall) for amount in (missing // 2, missing - missing // 2)]
    return torch.softmax(network(functional.pad(image, padding)[None])[0], dim=0)
