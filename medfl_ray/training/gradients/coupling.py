"""The coupling probe: replace one patient and see whether another's gradient moves.

What clipping promises holds for a patient's gradient only if that gradient is a function of this patient alone.
Shapes: N patients, K patches of a patient, C channels, L output channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medfl_ray.errors import NotFitForDP
from medfl_ray.training.gradients.patient_gradients import Gradient, GradientEngine, Patient

BatchLoss = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-5


def check_patients_apart(engine: GradientEngine, make_patient: Callable[[], Patient]) -> None:
    """Compute one patient's gradient between two pairs of other patients and compare, with equal dropout.

    Args:
      make_patient: returns a made-up patient, another one at each call.

    Raises:
      NotFitForDP: the gradient moves, so the network or engine keeps or mixes something of other patients.
    """
    patient, *companions = (make_patient() for _ in range(5))
    expected, found = (_gradient_between(engine, patient, *pair) for pair in (companions[:2], companions[2:]))
    if _relative_distance(expected, found) > TOLERANCE:
        raise NotFitForDP(
            "one patient's gradient moves when another patient is replaced: the network keeps a state between "
            "patients or mixes them. Use layers that treat samples apart and keep no statistics, such as GroupNorm"
        )


def _gradient_between(engine: GradientEngine, patient: Patient, before: Patient, after: Patient) -> Gradient:
    with torch.random.fork_rng(devices=_devices(patient)):
        torch.manual_seed(0)
        gradients = [gradient for gradient, _ in _copied(engine(iter([before, patient, after])))]
    return gradients[1]


def _copied(results: Iterator[tuple[Gradient, float]]) -> Iterator[tuple[Gradient, float]]:
    for gradient, loss in results:
        yield tuple(part.clone() for part in gradient), loss


def _devices(patient: Patient) -> list[torch.device]:
    device = patient[0].device
    return [device] if device.type == "cuda" else []


def check_loss_apart(loss: BatchLoss, logits_shape: tuple[int, ...], ignored: tuple[int, ...] = ()) -> None:
    """Refuse a loss over a batch of patients under which one patient's gradient depends on another's labels or output.

    Args:
      loss: (logits [N, L, *S], targets [N, *S]) -> scalar, one patient per row.
      logits_shape: [N, L, *S] with N of 2 or more.
      ignored: label values that the loss leaves out; read from `loss.ignore_index` as well.

    Raises:
      NotFitForDP: with the usual causes and what to use instead.
    """
    generator = torch.Generator().manual_seed(0)
    num_classes, shape = logits_shape[1], (logits_shape[0], *logits_shape[2:])
    logits = torch.randn(logits_shape, generator=generator)
    targets = torch.randint(0, num_classes, shape, generator=generator)
    values = {0, num_classes - 1, *ignored, max(0, int(getattr(loss, "ignore_index", 0)))}
    expected = _logit_gradient_of_first(loss, logits, targets)
    for value in sorted(values):
        other_logits, other_targets = logits.clone(), targets.clone()
        other_logits[1:] = torch.randn(logits[1:].shape, generator=generator)
        other_targets[1:] = value
        found = _logit_gradient_of_first(loss, other_logits, other_targets)
        if _relative_distance((expected,), (found,)) > TOLERANCE:
            raise NotFitForDP(
                "the loss of one patient moves when another patient is replaced (Dice over a batch does that, as do "
                "class weights or an ignored label normalised over a batch). Compute the loss within each patient and "
                "average over patients"
            )


def _logit_gradient_of_first(loss: BatchLoss, logits: Tensor, targets: Tensor) -> Tensor:
    variable = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable, targets), variable)
    return gradient[0]


def _relative_distance(expected: Gradient, found: Gradient) -> float:
    flat, other = (torch.cat([part.flatten().double() for part in parts]) for parts in (expected, found))
    return float((flat - other).norm() / flat.norm().clamp_min(1e-30))
