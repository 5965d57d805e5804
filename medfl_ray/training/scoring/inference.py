"""Whole-case inference: sliding windows over padded images, in evaluation mode.

Shapes: N images of one size, C channels, L output channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.prepare.windows import SlidingWindow
from medfl_ray.errors import ModelError

WINDOW = SlidingWindow()
WINDOWS_AT_ONCE = 4
# Small images go through the network together, up to about as many voxels as one volume of 64 voxels an edge has.
VOXELS_AT_ONCE = 64**3


def segment(network: nn.Module, images: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """Return logits [N, L, *S] of images [N, C, *S], from windows of the size that the network was trained on.

    An image smaller than the patch is padded with zeros and cropped back.
    """
    from monai.inferers.utils import sliding_window_inference

    at_once = max(WINDOWS_AT_ONCE, len(images))
    logits = sliding_window_inference(
        images, patch_size, at_once, network, overlap=WINDOW.overlap, mode=WINDOW.mode,
        sigma_scale=WINDOW.sigma_scale, padding_mode=WINDOW.padding,
    )  # fmt: skip
    if not isinstance(logits, Tensor):
        raise ModelError(
            "the network has several outputs; a segmentation network has one, so switch deep supervision off"
        )
    return logits


def classify(network: nn.Module, images: Tensor, smallest: tuple[int, ...]) -> Tensor:
    """Return class probabilities [N, L] of whole images [N, C, *S], padded with zeros to the smallest size."""
    shortfall = [max(0, low - edge) for low, edge in zip(smallest, images.shape[2:], strict=True)]
    padding = [amount for missing in reversed(shortfall) for amount in (missing // 2, missing - missing // 2)]
    return torch.softmax(network(functional.pad(images, padding)), dim=1)


def batches_of_one_size(cases: Sequence[PreparedCase]) -> Iterator[list[int]]:
    """Yield positions of cases whose images have one shape, in batches that fit in memory; every case once."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for position, case in enumerate(cases):
        by_shape.setdefault(case.image.shape, []).append(position)
    for shape, positions in by_shape.items():
        at_once = max(1, VOXELS_AT_ONCE // torch.Size(shape[1:]).numel())
        for start in range(0, len(positions), at_once):
            yield positions[start : start + at_once]
