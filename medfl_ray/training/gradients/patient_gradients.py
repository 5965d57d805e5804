"""Gradients of single patients: the reference, which works for every network, and a faster way for some.

Shapes: N patients, K patches of a patient, C channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

import structlog
import torch
from torch import Tensor, nn

from medfl_ray.models.grouped import group, repeat_weights, stack, unstack
from medfl_ray.models.quick_layers import quicken
from medfl_ray.training.gradients.malloc_trim import LARGE_PATIENT_VOXELS, release_freed_memory
from medfl_ray.training.gradients.memory import give_back_memory, is_out_of_memory
from medfl_ray.training.gradients.mixed_precision import mixed
from medfl_ray.training.losses import PatientLoss

log = structlog.get_logger()
Patient = tuple[Tensor, Tensor]
"""Images [K, C, *S] and targets [K, *S] or [K] of one patient."""
Gradient = tuple[Tensor, ...]
"""One tensor per trained parameter, in the network's order, float32 or wider."""
GradientEngine = Callable[[Iterator[Patient]], Iterator[tuple[Gradient, float]]]


class OneAtATime:
    """Patient by patient: one forward and backward pass over the patient's K patches.

    Memory is that of a single patient, and nothing of one patient is there when the next one comes.
    """

    def __init__(self, network: nn.Module, loss: PatientLoss, mixed_precision: bool = False) -> None:
        self._network, self._loss, self._mixed_precision = network, loss, mixed_precision
        self._parameters = trained_parameters(network)

    def __call__(self, patients: Iterator[Patient]) -> Iterator[tuple[Gradient, float]]:
        """Yield gradient and loss of each patient, in order."""
        for images, targets in patients:
            loss = self._loss(forward(self._network, images, self._mixed_precision), targets)
            gradient, value = torch.autograd.grad(loss, self._parameters), loss.item()
            del loss
            if is_large((images, targets)):
                release_freed_memory()
            yield gradient, value


class InGroups:
    """Several patients in one pass, each a convolution group of its own; the last group may be smaller.

    Every patient of a call has the same number of patches of the same size.
    """

    def __init__(
        self, network: nn.Module, loss: PatientLoss, mixed_precision: bool = False, group_size: int = 4
    ) -> None:
        self._network, self._loss, self._mixed_precision = network, loss, mixed_precision
        self._group_size = group_size
        self._members: dict[int, nn.Module] = {}

    def __call__(self, patients: Iterator[Patient]) -> Iterator[tuple[Gradient, float]]:
        """Yield gradient and loss of each patient, in order; where memory is exhausted, in smaller groups from then on.

        The patients who were drawn stay the same and so does each one's gradient.
        """
        while some := list(islice(patients, self._group_size)):
            yield from self._gradients_of(some)

    def _gradients_of(self, some: list[Patient]) -> Iterator[tuple[Gradient, float]]:
        try:
            gradients, losses = self._pass(some)
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
        else:
            for index, loss in enumerate(losses):
                yield tuple(gradient[index] for gradient in gradients), loss
            return
        # Here the error is gone, and with its traceback what the failed pass had allocated.
        self._group_size = min(self._group_size, (len(some) + 1) // 2)
        log.warning("memory_exhausted", patients_in_one_pass=len(some), now=self._group_size)
        self._members.clear()
        give_back_memory()
        while some:
            piece, some = some[: self._group_size], some[self._group_size :]
            yield from self._gradients_of(piece)

    def _pass(self, some: list[Patient]) -> tuple[tuple[Tensor, ...], list[float]]:
        """Return gradients, each with a first axis of patients, and the patients' losses."""
        if is_large(some[0]):  # what lies between the tensors of the last pass would add to the memory of this one
            release_freed_memory()
        members = self._load_members(len(some))
        logits = forward(members, stack([images for images, _ in some]), self._mixed_precision)
        own_logits = unstack(logits, len(some))
        losses = torch.stack([self._loss(own, targets) for own, (_, targets) in zip(own_logits, some, strict=True)])
        return torch.autograd.grad(losses.sum(), trained_parameters(members)), losses.tolist()

    def _load_members(self, num_members: int) -> nn.Module:
        if num_members not in self._members:
            members = group(self._network, num_members)
            on_cpu = next(members.parameters()).device.type == "cpu"
            self._members[num_members] = quicken(members) if on_cpu else members
        members = self._members[num_members]
        repeat_weights(self._network, members)
        return members.train(self._network.training)


def is_large(patient: Patient) -> bool:
    """Say whether a pass over a patient takes hundreds of megabytes of a CPU's memory."""
    images = patient[0]
    return not images.is_cuda and images[:, 0].numel() >= LARGE_PATIENT_VOXELS


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the network's order; the others are frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def forward(network: nn.Module, images: Tensor, mixed_precision: bool) -> Tensor:
    """Return logits, float32 or wider; only the network itself runs in bfloat16 where mixed precision is on."""
    with mixed(images.device.type) if mixed_precision else nullcontext():
        logits: Tensor = network(images)
    return logits if logits.dtype == torch.float64 else logits.float()
