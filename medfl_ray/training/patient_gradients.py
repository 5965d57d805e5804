"""Gradients of single patients: the reference, which works for every network, and the choice of a faster way.

Shapes: N patients, K patches of a patient, C channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from medfl_ray.training.losses import PatientLoss

Patient = tuple[Tensor, Tensor]
"""Images [K, C, *S] and targets [K, *S] or [K] of one patient."""
Gradient = tuple[Tensor, ...]
"""One tensor per parameter, in the network's order, float32 or wider."""
GradientEngine = Callable[[Sequence[Patient]], Iterator[tuple[Gradient, float]]]


class OneAtATime:
    """Patient by patient: one forward and backward pass over the patient's K patches.

    Memory is that of a single patient, and nothing of one patient is there when the next one comes.
    """

    def __init__(self, network: nn.Module, loss: PatientLoss, mixed_precision: bool = False) -> None:
        self._network, self._loss, self._mixed_precision = network, loss, mixed_precision
        self._parameters = list(network.parameters())

    def __call__(self, patients: Sequence[Patient]) -> Iterator[tuple[Gradient, float]]:
        """Yield gradient and loss of each patient, in order."""
        for images, targets in patients:
            loss = self._loss(forward(self._network, images, self._mixed_precision), targets)
            yield torch.autograd.grad(loss, self._parameters), loss.item()


def forward(network: nn.Module, images: Tensor, mixed_precision: bool) -> Tensor:
    """Return logits, float32 or wider; only the network itself runs in bfloat16 where mixed precision is on."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed_precision):
        logits: Tensor = network(images)
    return logits if logits.dtype == torch.float64 else logits.float()
