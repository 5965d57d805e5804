"""Noise of prefix sums through a binary tree: what DP-FTRL adds where cohorts cannot be sampled in secret."""

from __future__ import annotations

import numpy as np

from medfl_ray.privacy.noise import Floats, GaussianNoise


class TreeNoise:
    """The noise of one tree over consecutive rounds, round by round.

    The sum of the first t rounds carries one independent draw per set bit of t, so that its noise grows with the
    logarithm of t and not with t. The draws live in this object alone: nothing of them is ever stored, and a run
    that is resumed starts a new tree.

    Source: Kairouz et al. 2021, arXiv:2103.00039, algorithm 1 and appendix B (without Honaker's variance reduction).
    """

    def __init__(self, size: int, std: float) -> None:
        """Take the number of coordinates P and the standard deviation of each node's draw."""
        self._size, self._std = size, std
        self._source = GaussianNoise()
        self._nodes: dict[int, Floats] = {}
        self.num_steps = 0

    def next_increment(self) -> Floats:
        """Return the noise of the next prefix less that of the prefix before it, shape [P] in float64."""
        self.num_steps += 1
        level = (self.num_steps & -self.num_steps).bit_length() - 1
        node = self._source.draw(self._size, self._std)
        closed = [self._nodes.pop(below) for below in range(level)]
        self._nodes[level] = node
        return node - np.sum(closed, axis=0) if closed else node.copy()
