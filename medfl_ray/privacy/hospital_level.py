"""Hospital-level differential privacy at a trusted coordinator: clip each update, sum, noise the sum.

What one hospital can move is its whole update. The sum is divided by the expected size of a cohort, a public
number, and never by the size of the one drawn; an empty cohort is noised and charged like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medfl_ray.errors import PrivacyConfigError
from medfl_ray.params import Vector
from medfl_ray.privacy.noise import Floats, GaussianNoise
from medfl_ray.privacy.sampler import PoissonSampler
from medfl_ray.privacy.tree import TreeNoise

LARGEST_CLIP_NORM = 1e3
"""Above it a sum of 67,000 updates would not fit the fixed-point sums of medfl_ray/aggregation."""
SMALLEST_CLIP_NORM = 1e-6
FLOAT32_MARGIN = 1e-6
FIXED_POINT_STEP = 2.0**-36
SMALL_FEDERATION = 100


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip norm follows a quantile of the updates' norms.

    target_quantile: the share of hospitals whose update is to fit the clip norm. learning_rate: of its geometric
    steps. count_std: standard deviation of the noise on the number of updates that fitted.
    """

    target_quantile: float
    learning_rate: float
    count_std: float


def clip_update(update: Vector, clip_norm: float) -> tuple[Vector, bool]:
    """Return an update [P] scaled down to a norm of at most clip_norm, and whether it already was within it.

    The norm is taken in float64; the margin covers what float32 and the fixed-point sum round, so that what is
    summed never exceeds the clip norm. An update that is not finite is returned as it is, for the sum to refuse.
    """
    norm = float(np.linalg.norm(update.astype(np.float64)))
    bound = clip_norm * (1 - FLOAT32_MARGIN) - math.sqrt(update.size) * FIXED_POINT_STEP
    if not math.isfinite(norm) or norm <= bound:
        return update, norm <= clip_norm
    clipped: Vector = (update.astype(np.float64) * (max(bound, 0.0) / norm)).astype(np.float32)
    return clipped, norm <= clip_norm


def split_noise(noise_multiplier: float, count_std: float) -> float:
    """Return the noise multiplier of the updates, when the count of clipped updates is noised as well.

    Both together cost what one Gaussian mechanism with noise_multiplier costs: the count is taken of +-1/2 per
    hospital, so that its own noise multiplier is 2 count_std.

    Raises:
      PrivacyConfigError: the count's noise alone would cost more than the whole.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871, theorem 1.
    """
    if not 2 * count_std > noise_multiplier:
        raise PrivacyConfigError(
            f"privacy.hospital_level.count_noise is {count_std:g}; with noise_multiplier {noise_multiplier:g} it must "
            f"exceed {noise_multiplier / 2:g}, or the count alone costs more than the run may spend. Raise it"
        )
    return float((noise_multiplier**-2 - (2 * count_std) ** -2) ** -0.5)


class CentralMechanism:
    """What the coordinator does to one round's sum; clip norm and tree are its only state between rounds.

    The clip norm is computed from noised counts and may be stored. The tree's noise never is.
    """

    def __init__(
        self,
        size: int,
        noise_multiplier: float,
        clip_norm: float,
        expected_cohort: float,
        adaptive: AdaptiveClip | None = None,
    ) -> None:
        """Take P = size, sigma, the (first) clip norm C and the public, expected number of hospitals in a cohort."""
        if not expected_cohort > 0:
            raise PrivacyConfigError(f"the expected cohort is {expected_cohort!r} hospitals; it must be above 0")
        self._size = size
        self._expected_cohort = expected_cohort
        self._adaptive = adaptive
        self._sigma = split_noise(noise_multiplier, adaptive.count_std) if adaptive else noise_multiplier
        self._noise = GaussianNoise()
        self._tree: TreeNoise | None = None
        self.clip_norm = clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum of clipped updates, per coordinate (of a tree: per node)."""
        return self._sigma * self.clip_norm

    def start_tree(self) -> None:
        """Draw the noise of the rounds from here on through a new tree."""
        self._tree = TreeNoise(self._size, self.noise_std)

    def release(self, total: Floats, num_within: int, num_updates: int) -> Vector:
        """Return the noised sum [P] over the expected cohort, as float32, and let an adaptive clip norm follow.

        Args:
          total: sum of the clipped updates; zeros where nobody was drawn or nobody answered.
          num_within: how many of the updates were within the clip norm before they were clipped.
          num_updates: how many updates the sum holds.
        """
        noise = self._tree.next_increment() if self._tree else self._noise.draw(self._size, self.noise_std)
        mean: Vector = ((total + noise) / self._expected_cohort).astype(np.float32)
        if self._adaptive is not None:
            self._follow(self._adaptive, num_within - num_updates / 2)
        return mean

    def _follow(self, adaptive: AdaptiveClip, centred_count: float) -> None:
        noised = centred_count + float(self._noise.draw(1, adaptive.count_std)[0])
        fraction = 0.5 + noised / self._expected_cohort
        self.clip_norm = next_clip_norm(self.clip_norm, fraction, adaptive)


def next_clip_norm(clip_norm: float, fraction: float, adaptive: AdaptiveClip) -> float:
    """Return the clip norm after a round in which a (noised) fraction of the updates were within it.

    Rounded to float32, as which checkpoints keep it.

    Source: Andrew et al. 2021, arXiv:1905.03871, algorithm 1.
    """
    moved = clip_norm * math.exp(-adaptive.learning_rate * (fraction - adaptive.target_quantile))
    return float(np.float32(min(max(moved, SMALLEST_CLIP_NORM), LARGEST_CLIP_NORM)))


def sample_cohort(hospitals: Sequence[str], sample_rate: float) -> tuple[str, ...]:
    """Draw a cohort: each hospital with probability sample_rate, independently, from OS entropy; it may be empty."""
    ordered = sorted(hospitals)
    return tuple(ordered[index] for index in PoissonSampler(sample_rate).draw(len(ordered)))


def tree_cohort(hospitals: Sequence[str], tree: int, step: int, num_steps: int, seed: int) -> tuple[str, ...]:
    """Return who takes part in step 1 to num_steps of a tree: every hospital in exactly one step of each tree.

    The deal is public, for no amplification is claimed.
    """
    ordered = sorted(hospitals)
    order = np.random.default_rng(np.random.SeedSequence([abs(seed), tree, 0x7EEE])).permutation(len(ordered))
    return tuple(sorted(ordered[index] for index in order[step - 1 :: num_steps]))
