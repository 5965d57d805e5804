"""Bins of probabilities and the error that follows from them, by hand."""

import pytest
import torch

from medfl_ray.analytics.evaluation_summary import add_bins, expected_calibration_error
from medfl_ray.training.scoring.calibration import NUM_BINS, ReliabilityCounter


def counted(cases, names=("core",), first=1):
    counter = ReliabilityCounter(names)
    for probabilities, truth in cases:
        counter.add(torch.tensor(probabilities), torch.tensor(truth), first)
    return counter.bins()


def test_four_voxels_by_hand():
    core = [0.05, 0.25, 0.25, 0.95]
    bins = counted([([[1 - p for p in core], core], [0, 1, 0, 1])])["core"]
    assert bins.counts == (1, 0, 2, 0, 0, 0, 0, 0, 0, 1)
    assert bins.sum_probability[2] == pytest.approx(0.5)
    assert bins.num_true[2] == 1
    # Bins: |0.05 - 0| + |0.5 - 1| + |0.95 - 1|, over four voxels.
    assert expected_calibration_error(bins) == pytest.approx((0.05 + 0.5 + 0.05) / 4, abs=1e-6)


def test_cases_and_hospitals_add_up():
    cases = [([[0.9, 0.2], [0.1, 0.8]], [0, 1]), ([[0.4], [0.6]], [0])]
    together = counted(cases)["core"]
    apart = add_bins(counted(cases[:1])["core"], counted(cases[1:])["core"])
    assert together == apart
    assert sum(together.counts) == 3
    assert len(together.counts) == NUM_BINS


def test_classes_of_images_are_counted_one_against_the_rest():
    bins = counted([([0.2, 0.3, 0.5], 2), ([0.65, 0.25, 0.1], 0)], names=("a", "b", "c"), first=0)
    assert bins["a"].num_true[6] == 1
    assert bins["b"].num_true == (0.0,) * NUM_BINS
    assert sum(bins["b"].counts) == 2
