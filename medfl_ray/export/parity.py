"""Whether the exported model says what the trained one says, on images that may be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.errors import ExportError
from medfl_ray.export.package import ModelPackage
from medfl_ray.training.scoring.evaluation import dice_per_label

Image = npt.NDArray[np.float32]
NUM_IMAGES = 2
RELATIVE_TOLERANCE = 1e-3
MIN_AGREEMENT = 0.999


@dataclass(frozen=True)
class Parity:
    """Largest difference of the logits, share of equal labels and Dice between the two models' labels."""

    max_abs_difference: float
    agreement: float
    dice: float
    num_patches: int
    images: str


def parity_images(package: ModelPackage, data: HospitalData | None) -> tuple[list[Image], str]:
    """Return prepared images [C, *S] and their origin: held-out public ones, or rendered phantoms."""
    if data is not None:
        count = min(NUM_IMAGES, len(data.holdout))
        return [data.holdout[i].image for i in range(count)], f"{count} held-out {data.declared} images"
    return [phantom_image(package, index) for index in range(NUM_IMAGES)], f"{NUM_IMAGES} phantoms"


def phantom_image(package: ModelPackage, index: int) -> Image:
    """Render a prepared head [C, *S] and deal its channels to the model's, however many it has."""
    from medfl_ray.data.phantoms.render import render_phantom

    rendered = render_phantom("brain_tumour" if package.spatial_dims == 3 else "tumour_slices", 0, index).image
    image = rendered[[channel % len(rendered) for channel in range(package.num_channels)]].astype(np.float32)
    axes = tuple(range(1, image.ndim))
    scale = np.maximum(image.std(axis=axes, keepdims=True), 1e-6)
    return np.asarray((image - image.mean(axis=axes, keepdims=True)) / scale, dtype=np.float32)


def patches_of(images: Sequence[Image], size: tuple[int, ...]) -> Tensor:
    """Return the middles of the images, cut or padded to one size: [N, C, *size]."""
    return torch.from_numpy(np.stack([_middle(image, size) for image in images]))


def _middle(image: Image, size: tuple[int, ...]) -> Image:
    padding = [
        (0, 0),
        *((max(0, p - n) // 2, max(0, p - n + 1) // 2) for p, n in zip(size, image.shape[1:], strict=True)),
    ]
    padded = np.pad(image, padding)
    starts = [(n - p) // 2 for p, n in zip(size, padded.shape[1:], strict=True)]
    return padded[(slice(None), *(slice(s, s + p) for s, p in zip(starts, size, strict=True)))]


def measure_parity(
    network: nn.Module, run_exported: Callable[[Image], Image], batches: Sequence[Tensor], images: str
) -> Parity:
    """Run both models on every batch [N, C, *S] and compare.

    Raises:
      ExportError: the logits differ by more than 1e-3 of their range, or one label in a thousand differs.
    """
    with torch.inference_mode():
        expected = [network(batch).numpy() for batch in batches]
    found = [run_exported(batch.numpy()) for batch in batches]
    pairs = list(zip(expected, found, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise ExportError("the exported model's output has another shape than the trained one's; it was not kept")
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    scale = max(1.0, *(float(np.abs(a).max()) for a in expected))
    labels = [(a.argmax(axis=1), b.argmax(axis=1)) for a, b in pairs]
    agreement = float(np.mean(np.concatenate([(a == b).reshape(-1) for a, b in labels])))
    if not difference <= RELATIVE_TOLERANCE * scale or agreement < MIN_AGREEMENT:
        raise ExportError(
            f"parity failed: the exported model's logits differ by up to {difference:.2g}, of {scale:.2g}, "
            f"and {agreement:.2%} of the labels agree; expected at most {RELATIVE_TOLERANCE:g} of the range and "
            f"at least {MIN_AGREEMENT:.1%}. No model.onnx was kept"
        )
    classes = {value: str(value) for value in range(1, expected[0].shape[1])}
    dice = float(np.mean([list(dice_per_label(b, a, classes).values()) for a, b in labels]))
    return Parity(difference, agreement, dice, sum(len(batch) for batch in batches), images)
