"""Figures of one segmented case per label, beyond Dice: overlap, volume and distances between surfaces.

Every figure exists for every case, so that a mean over patients is over the same patients in each column. Both masks
empty is full agreement. One of them empty is none: precision, recall and surface Dice are 0, and HD95 is the diagonal
of the image, the largest distance that there could be (where MONAI has infinity, of which there is no mean).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from medfl_ray.config.evaluation import FigureName

Mask = npt.NDArray[np.bool_]
MM3_PER_ML, MM2_PER_CM2 = 1000.0, 100.0


def case_figures(
    prediction: npt.NDArray[np.integer],
    truth: npt.NDArray[np.integer],
    labels: Mapping[int, str],
    spacing_mm: Sequence[float],
    wanted: Sequence[FigureName],
    tolerance_mm: float,
) -> dict[str, float]:
    """Return "<figure>/<label>" for every figure wanted, and "<figure>", its mean over the labels.

    Args:
      prediction, truth: label maps [*S]. spacing_mm: size of a voxel along each axis, 1 mm where it is not known.
      tolerance_mm: distance up to which a piece of surface counts as right in surface_dice.

    Source: HD95 and normalised surface Dice (Nikolov et al. 2018, arXiv:1809.04430) are MONAI's.
    """
    spacing = tuple(spacing_mm) or (1.0,) * truth.ndim
    found: dict[str, float] = {}
    for name in wanted:
        per_label = {
            f"{name}/{label}": FIGURES[name](prediction == value, truth == value, spacing, tolerance_mm)
            for value, label in labels.items()
        }
        found |= {name: float(np.mean(list(per_label.values()))), **per_label}
    return found


def figure_names(labels: Mapping[int, str], wanted: Sequence[FigureName]) -> tuple[str, ...]:
    """Return the names that `case_figures` gives, whatever the case."""
    return tuple(full for name in wanted for full in (name, *(f"{name}/{label}" for label in labels.values())))


def _precision(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance_mm: float) -> float:
    return _share(prediction & truth, prediction, truth)


def _recall(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance_mm: float) -> float:
    return _share(prediction & truth, truth, prediction)


def _share(both: Mask, of: Mask, other: Mask) -> float:
    """Return the share of one mask that lies in the other; 1 where both are empty, 0 where one is."""
    if of.any():
        return float(both.sum() / of.sum())
    return 0.0 if other.any() else 1.0


def _volume_error(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Return the absolute difference of the volumes in ml, of areas in cm2."""
    unit = MM3_PER_ML if truth.ndim == 3 else MM2_PER_CM2
    return abs(int(prediction.sum()) - int(truth.sum())) * float(np.prod(spacing)) / unit


def _hd95(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Return the larger of both 95th percentiles of surface distances, in mm."""
    if not (prediction.any() and truth.any()):
        edges = np.asarray(truth.shape) * np.asarray(spacing)
        return float(np.linalg.norm(edges)) if prediction.any() or truth.any() else 0.0
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    with _without_deprecations():
        found = compute_hausdorff_distance(
            *_batches(prediction, truth), include_background=True, percentile=95, spacing=list(spacing)
        )
    return float(found.item())


def _surface_dice(prediction: Mask, truth: Mask, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Return the share of both surfaces that lies within the tolerance of the other one."""
    if not (prediction.any() and truth.any()):
        return 0.0 if prediction.any() or truth.any() else 1.0
    from monai.metrics.surface_dice import compute_surface_dice

    with _without_deprecations():
        found = compute_surface_dice(
            *_batches(prediction, truth), class_thresholds=[tolerance_mm], include_background=True,
            spacing=list(spacing),
        )  # fmt: skip
    return float(found.item())


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Keep to itself that MONAI calls its own function with an argument that it has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _batches(prediction: Mask, truth: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both masks as MONAI takes them, [1, 1, *S]."""
    return torch.from_numpy(prediction[None, None]), torch.from_numpy(truth[None, None])


FIGURES: dict[str, Callable[[Mask, Mask, Sequence[float], float], float]] = {
    "precision": _precision,
    "recall": _recall,
    "volume_error": _volume_error,
    "hd95": _hd95,
    "surface_dice": _surface_dice,
}
