"""Artificial patients that are put into the private steps to see what can be read back from what is released.

No image and no real patient is touched, so that an audit costs no privacy. A canary's gradient points along an
axis of its own; it is handed over larger than the clip norm C, so that clipping is audited as well.

Only the subspace that the canaries span is computed: m canaries have m parameters. That loses nothing. The
canaries are orthonormal and the noise is the same in every direction (a Gaussian turned around is the same
Gaussian), so that the coordinates along the canaries of a network with millions of parameters have exactly this
distribution, and the other coordinates say nothing about a canary. What other patients add is known to the
attacker of differential privacy, who would subtract it. For speed the canaries come in groups, each
with steps of its own; canaries of different groups never meet, so one canary's presence still moves only what its
own group releases, and the whole is as private as one group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.auditing import Bools, Floats
from medfl_ray.privacy.dpsgd import private_steps

GROUP = 800
OVERSHOOT = 10.0
"""Norm of a canary's gradient over C, before clipping."""
FEWEST = 100
MIN_NOISE = 1e-3
NEAREST_QUARTER = float(norm.ppf(0.625))
"""Distance from its mean within which a quarter of a standard Gaussian lies."""


@dataclass(frozen=True, eq=False)
class CanaryScores:
    """What one run released about m canaries.

    included: the secret coins, [m]. sums: the released steps added up along each canary, over C, [m]; what
    someone sees who has only the final weights. likelihoods: log of how much likelier the released steps are with
    the canary than without, [m]; the best statistic of someone who sees every step.
    """

    included: Bools
    sums: Floats
    likelihoods: Floats


def run_canaries(mechanism: Mechanism, num_steps: int, num_canaries: int) -> CanaryScores:
    """Run the mechanism's private steps on canaries, each in the data with probability 1/2.

    Args:
      mechanism: sigma, q, C and N as they trained; its own num_steps is one round's and is not used.
      num_steps: steps of the whole run.

    Raises:
      PrivacyConfigError: there are no steps or fewer than 100 canaries.
    """
    if num_steps < 1 or num_canaries < FEWEST:
        raise PrivacyConfigError(
            f"an audit of {num_steps} steps with {num_canaries} canaries says nothing; give 1 step and "
            f"{FEWEST} canaries at least"
        )
    included = _coins(num_canaries)
    sums, likelihoods = np.zeros(num_canaries), np.zeros(num_canaries)
    for start in range(0, num_canaries, GROUP):
        group = slice(start, start + GROUP)
        for released in _released_steps(mechanism, included[group], num_steps):
            sums[group] += released
            sigma = min(mechanism.noise_multiplier, _noise_seen(released))
            likelihoods[group] += log_likelihood_ratio(released, mechanism.sample_rate, sigma)
    return CanaryScores(included, sums, likelihoods)


def log_likelihood_ratio(released: Floats, sample_rate: float, noise_multiplier: float) -> Floats:
    """Return log(1 - q + q e^((2 x - 1) / (2 sigma^2))) of one step's values x, in units of C.

    That is the density of a step that holds the canary with probability q over that of one which does not.
    """
    drawn = (2 * released - 1) / (2 * noise_multiplier**2) + math.log(sample_rate)
    return np.logaddexp(drawn, math.log1p(-sample_rate)) if sample_rate < 1 else drawn


def _noise_seen(released: Floats) -> float:
    """Return the noise that a step seems to have: an attacker who finds less than was claimed makes use of it.

    Taken from the quarter of the values that is nearest to their middle, which holds where up to half of the
    canaries were drawn. Never quite 0, which no ratio could be taken with.
    """
    distances = np.abs(released - np.median(released))
    return max(MIN_NOISE, float(np.quantile(distances, 0.25)) / NEAREST_QUARTER)


def _released_steps(mechanism: Mechanism, included: Bools, num_steps: int) -> Iterator[Floats]:
    """Yield what each step released along every canary of a group, in units of C."""
    present = np.flatnonzero(included)
    values = np.zeros(len(included))
    gradient = torch.from_numpy(values)

    def gradients(drawn: npt.NDArray[np.intp]) -> Iterator[tuple[torch.Tensor]]:
        for axis in present[drawn]:
            values[axis] = OVERSHOOT * mechanism.max_grad_norm
            yield (gradient,)
            values[axis] = 0.0

    back = mechanism.sample_rate * mechanism.num_records / mechanism.max_grad_norm
    for mean in islice(private_steps(mechanism, len(included), len(present), gradients), num_steps):
        yield mean.numpy() * back


def _coins(number: int) -> Bools:
    """Flip secret coins with the operating system's entropy: a canary that could be guessed would be no evidence."""
    return np.unpackbits(np.frombuffer(os.urandom(-(-number // 8)), dtype=np.uint8))[:number].astype(bool)
