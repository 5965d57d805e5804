"""One private step: clip each patient's gradient, sum, add noise, divide by the public expected batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.noise import GaussianNoise
from medfl_ray.privacy.sampler import PoissonSampler

PatientGradients = Callable[[npt.NDArray[np.intp]], Iterable[Iterable[torch.Tensor]]]
"""Patient indices, [B], to one gradient per patient, each one tensor per parameter."""


class PatientGradientSum:
    """The clipped sum of one step's patient gradients, of which only the noised mean comes out.

    Norms, sum and noise are float64: a float32 norm over millions of parameters is off by 1e-4, and the
    bound C on one patient's influence with it.
    """

    def __init__(self, num_parameters: int, mechanism: Mechanism, noise: GaussianNoise | None = None) -> None:
        """Start an empty step of `num_parameters` trained parameters, P."""
        if num_parameters < 1:
            raise PrivacyConfigError(f"the network has {num_parameters} trained parameters; at least one is needed")
        self._mechanism = mechanism
        self._noise = noise or GaussianNoise()
        self._num_parameters = num_parameters
        self._sum: torch.Tensor | None = None

    def add(self, gradient: Iterable[torch.Tensor]) -> None:
        """Add the gradient of one patient, one tensor per parameter in a fixed order.

        A patient may be added once per step; the sampler sees to it. The tensors are not changed. A gradient
        that holds a NaN or an infinity counts as zero: it has no norm to clip, and zero keeps the patient's
        influence below C. This is not reported, since the report too would be about the patient.

        Raises:
          PrivacyConfigError: the tensors do not have P elements together.
        """
        tensors = [tensor.detach() for tensor in gradient]
        num_elements = sum(tensor.numel() for tensor in tensors)
        if num_elements != self._num_parameters:
            raise PrivacyConfigError(f"a gradient has {num_elements} elements; this step sums {self._num_parameters}")
        flat = _flatten(tensors)
        norm = _norm(flat)
        if not math.isfinite(norm):
            return
        scale = min(1.0, self._mechanism.max_grad_norm / norm) if norm > 0 else 1.0
        self._total().add_(flat, alpha=scale)

    def release(self) -> torch.Tensor:
        """Return (sum + noise) / (q N), float64 of shape [P] on the CPU, and start the next step from zero.

        An empty step is noised like any other. N is the public number of patients, never a count.
        """
        mechanism = self._mechanism
        std = mechanism.noise_multiplier * mechanism.max_grad_norm
        noised = self._total() + torch.from_numpy(self._noise.draw(self._num_parameters, std))
        # The same sum under a second noise would be a second release that no ledger accounts for.
        self._sum = None
        return noised / (mechanism.sample_rate * mechanism.num_records)

    def _total(self) -> torch.Tensor:
        """Return the sum so far; allocated after the first gradient, whose pass needs the memory."""
        if self._sum is None:
            self._sum = torch.zeros(self._num_parameters, dtype=torch.float64)
        return self._sum


class PrivateStep:
    """What a private step of one hospital is made of: its own secret sample, its own sum and its own noise."""

    def __init__(self, mechanism: Mechanism, num_parameters: int, num_patients: int) -> None:
        """Take the P trained parameters and the actual number of patients, which stays inside the hospital."""
        self._sampler = PoissonSampler(mechanism.sample_rate)
        self._num_patients = num_patients
        self._total = PatientGradientSum(num_parameters, mechanism)

    def draw(self) -> npt.NDArray[np.intp]:
        """Draw the patients of the next step, [B]; each is to be added once."""
        return self._sampler.draw(self._num_patients)

    def add(self, gradient: Iterable[torch.Tensor]) -> None:
        """Add the gradient of one drawn patient; see `PatientGradientSum.add`."""
        self._total.add(gradient)

    def release(self) -> torch.Tensor:
        """Return the noised mean, float64 of shape [P]; see `PatientGradientSum.release`."""
        return self._total.release()


def private_steps(
    mechanism: Mechanism, num_parameters: int, num_patients: int, gradients: PatientGradients
) -> Iterator[torch.Tensor]:
    """Yield what one private step after another releases, each float64 of shape [P]; without end.

    Training and the audit both run this function, so that what is audited is what trains; hospitals that train
    as one group take the same `PrivateStep`, each its own.

    Args:
      num_patients: the actual number that the sampler draws from; it stays inside the hospital.
    """
    step = PrivateStep(mechanism, num_parameters, num_patients)
    while True:
        for gradient in gradients(step.draw()):
            step.add(gradient)
        yield step.release()


def gradient_norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm over all tensors together, accumulated in float64; infinite where it is not finite."""
    return _norm(_flatten(tensors))


def _flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return all elements as one float64 vector [P] on the CPU: a few calls on long vectors, not hundreds on short."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).to("cpu", torch.float64)


def _norm(flat: torch.Tensor) -> float:
    square = float(torch.dot(flat, flat))
    return math.sqrt(square) if math.isfinite(square) else math.inf
