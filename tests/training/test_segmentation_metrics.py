"""Figures of a case beside numbers worked out by hand, and beside MONAI's on whole volumes."""

import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice, get_confusion_matrix

from medfl_ray.training.scoring.evaluation import PatientScore, average_cases, metric_names, summarise
from medfl_ray.training.scoring.segmentation_metrics import case_figures, figure_names

ALL = ("precision", "recall", "volume_error", "hd95", "surface_dice")


def figures(prediction, truth, spacing=(1, 1, 1), wanted=ALL, tolerance=1.0):
    return case_figures(np.asarray(prediction), np.asarray(truth), {1: "core"}, spacing, wanted, tolerance)


def bar(start, stop, length=12):
    """A volume of one voxel's thickness with a bar along its last axis."""
    volume = np.zeros((3, 3, length), dtype=np.uint8)
    volume[1, 1, start:stop] = 1
    return volume


def test_a_shifted_bar_by_hand():
    found = figures(bar(2, 6), bar(3, 9), spacing=(2, 5, 3))
    assert found["precision"] == pytest.approx(3 / 4)  # 3, 4, 5 of 2, 3, 4, 5
    assert found["recall"] == pytest.approx(3 / 6)
    assert found["volume_error"] == pytest.approx(2 * 30 / 1000)  # two voxels of 30 mm3
    # One voxel of the prediction lies 3 mm outside; of the truth voxels 6, 7, 8 lie 3, 6 and 9 mm away.
    distances = [0, 0, 0, 3, 6, 9]
    assert found["hd95"] == pytest.approx(np.quantile(distances, 0.95))
    assert found["surface_dice"] == pytest.approx((3 + 3) / (4 + 6))  # within 1 mm
    wide = figures(bar(2, 6), bar(3, 9), spacing=(2, 5, 3), wanted=("surface_dice",), tolerance=6.0)
    assert wide["surface_dice"] == pytest.approx((4 + 5) / 10)


def test_two_dimensions_count_areas():
    prediction, truth = np.zeros((2, 8, 8), dtype=np.uint8)
    prediction[2:4, 2:4], truth[2:6, 2:4] = 1, 1
    found = figures(prediction, truth, spacing=(2, 2))
    assert found["volume_error"] == pytest.approx(4 * 4 / 100)
    assert found["precision"] == 1.0
    assert found["recall"] == 0.5


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (bar(0, 0), bar(0, 0), (1, 1, 0, 0, 1)),
        (bar(2, 4), bar(0, 0), (0, 0, 0.002, np.linalg.norm((3, 3, 12)), 0)),
        (bar(0, 0), bar(2, 4), (0, 0, 0.002, np.linalg.norm((3, 3, 12)), 0)),
    ],
)
def test_empty_masks_have_figures_too(prediction, truth, expected):
    found = figures(prediction, truth)
    assert [found[name] for name in ALL] == pytest.approx(list(expected))


def test_it_agrees_with_monai_on_random_blobs():
    rng = np.random.default_rng(4)
    spacing = (1.0, 0.7, 2.5)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (14, 16, 10)), indexing="ij"))
    for _ in range(3):
        masks = []
        for _ in range(2):
            centre, radius = rng.uniform(4, 8, 3), rng.uniform(2.5, 5)
            masks.append((((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2).astype(np.uint8))
        found = figures(*masks, spacing=spacing, tolerance=2.0)
        one_hot = [torch.from_numpy(mask[None, None]).float() for mask in masks]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distance = compute_hausdorff_distance(*one_hot, include_background=True, percentile=95, spacing=spacing)
            surface = compute_surface_dice(*one_hot, class_thresholds=[2.0], include_background=True, spacing=spacing)
        true_positive, false_positive, _, false_negative = get_confusion_matrix(*one_hot)[0, 0].tolist()
        assert found["hd95"] == pytest.approx(distance.item())
        assert found["surface_dice"] == pytest.approx(surface.item())
        assert found["precision"] == pytest.approx(true_positive / (true_positive + false_positive))
        assert found["recall"] == pytest.approx(true_positive / (true_positive + false_negative))


def test_figures_average_over_cases_then_patients():
    one = PatientScore(dice={"core": 0.5}, more={"hd95": 4.0, "hd95/core": 4.0})
    other = PatientScore(dice={"core": 0.7}, more={"hd95": 2.0, "hd95/core": 2.0})
    patient = average_cases([one, other])
    assert patient.figures == pytest.approx({"dice": 0.6, "dice/core": 0.6, "hd95": 3.0, "hd95/core": 3.0})
    assert summarise([patient, one])["hd95"] == pytest.approx(3.5)
    names = (*metric_names("segmentation", {1: "core"}), *figure_names({1: "core"}, ("hd95",)))
    assert set(summarise([patient])) == set(names)
