"""How sure a mean over patients is: percentile bootstrap over patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from medfl_ray.training.scoring.evaluation import PatientScore, summarise

NUM_RESAMPLES = 1000
LEVEL = 0.95
Intervals = dict[str, tuple[float, float]]


def bootstrap_intervals(
    scores: Sequence[PatientScore], summary: Callable[[Sequence[PatientScore]], dict[str, float]] = summarise
) -> Intervals:
    """Return the 95 % interval of every figure of the summary, patients drawn with replacement.

    The resamples are seeded, so that one evaluation always has the same intervals. Resamples in which a
    figure does not exist (an AUC of one class) are passed over.
    """
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(NUM_RESAMPLES):
        for name, value in summary([scores[i] for i in rng.integers(len(scores), size=len(scores))]).items():
            drawn.setdefault(name, []).append(value)
    tail = (1 - LEVEL) / 2
    return {name: _bounds(values, tail) for name, values in drawn.items()}


def intervals_of_means(rows: Sequence[Mapping[str, float]], seed: int = 0) -> Intervals:
    """Return the 95 % percentile interval of the mean of every column, patients drawn with replacement.

    Args:
      rows: one table of figures per patient, all with the same names; nothing is returned for no patients.
      seed: the same seed gives the same intervals.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if not rows:
        return {}
    names = list(rows[0])
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(rows), size=(NUM_RESAMPLES, len(rows)))
    means = table[drawn].mean(axis=1)
    return {name: _bounds(means[:, place].tolist(), (1 - LEVEL) / 2) for place, name in enumerate(names)}


def interval_of_means(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of several hospitals' means, patients drawn within each hospital.

    Args:
      groups: one figure per patient of each hospital; no hospital without a patient.
    """
    rng = np.random.default_rng(0)
    columns = []
    for group in groups:
        scores = np.asarray(group, dtype=np.float64)
        columns.append(scores[rng.integers(len(scores), size=(NUM_RESAMPLES, len(scores)))].mean(axis=1))
    return _bounds(np.mean(columns, axis=0).tolist(), (1 - LEVEL) / 2)


def _bounds(values: Sequence[float], tail: float) -> tuple[float, float]:
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
