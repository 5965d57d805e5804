"""The quick way over parallel axes takes what the general one takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.ndimage import affine_transform

from medfl_ray.data.prepare.nearest import take_nearest

LABELS = np.random.default_rng(0).integers(0, 9, (7, 9, 12)).astype(np.uint8)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_parallel_axes(order, flips):
    matrix = np.eye(3)[list(order)] @ np.diag(np.array(flips) * (0.71, 1.37, 1.0))
    start = matrix @ np.array([3.1, 2.2, 4.3])
    offset = np.array([3, 4, 5.5]) - start
    expected = affine_transform(LABELS, matrix, offset, output_shape=(8, 5, 11), order=0, mode="nearest")
    assert np.array_equal(take_nearest(LABELS, matrix, offset, (8, 5, 11)), expected)


def test_a_tilted_grid_by_hand():
    half = np.sqrt(0.5)
    turn = np.array([[half, -half], [half, half]])
    found = take_nearest(np.array([[1, 2], [3, 4]], dtype=np.uint8), turn, np.zeros(2), (2, 2))
    # (1, 0) lies at (0.7, 0.7), (0, 1) at (-0.7, 0.7) and (1, 1) at (0, 1.4).
    assert found.tolist() == [[1, 2], [4, 2]]


def test_two_axes():
    found = take_nearest(LABELS[0], np.diag([0.5, 2.0]), np.zeros(2), (14, 6))
    assert np.array_equal(found[::2], LABELS[0][:7, ::2])
