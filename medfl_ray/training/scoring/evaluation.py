"""Scores per patient and their summary: Dice per label, or AUC and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.messages import HEADLINES

Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class PatientScore:
    """One patient's result, cases averaged; of segmentation or of classification, never with an identifier.

    dice: label name -> Dice. probabilities: class probabilities [L]; truth: the class. more: further figures of a
    segmentation, "hd95" and "hd95/<label>" among them; see `segmentation_metrics.case_figures`.
    """

    dice: dict[str, float] | None = None
    probabilities: tuple[float, ...] | None = None
    truth: int | None = None
    more: dict[str, float] | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Every figure of the patient by name: "dice", "dice/<label>" and `more`; the headline of a classification."""
        if self.dice is None:
            return {"probability_of_truth": self.headline}
        return {
            "dice": self.headline,
            **{f"dice/{name}": value for name, value in self.dice.items()},
            **(self.more or {}),
        }

    @property
    def headline(self) -> float:
        """The one figure of the patient: mean Dice, or the probability given to the true class."""
        if self.probabilities is not None and self.truth is not None:
            return self.probabilities[self.truth]
        return float(np.mean(list((self.dice or {}).values())))


def dice_per_label(prediction: Labels, truth: Labels, labels: Mapping[int, str]) -> dict[str, float]:
    """Return Dice per label name; 1 where prediction and truth are both empty."""
    return {name: _dice(prediction == value, truth == value) for value, name in labels.items()}


def _dice(prediction: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    total = int(prediction.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2.0 * int((prediction & truth).sum()) / total


def average_cases(scores: Sequence[PatientScore]) -> PatientScore:
    """Return one patient's score from those of the cases; the truth of several classes is the largest."""
    if scores[0].dice is not None:
        tables = [score.dice or {} for score in scores]
        more = [score.more for score in scores if score.more is not None]
        return PatientScore(dice=_mean_table(tables), more=_mean_table(more) if len(more) == len(scores) else None)
    probabilities = np.mean([score.probabilities for score in scores if score.probabilities], axis=0)
    truths = [score.truth for score in scores if score.truth is not None]
    return PatientScore(probabilities=tuple(probabilities.tolist()), truth=max(truths))


def _mean_table(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}


def summarise(scores: Iterable[PatientScore]) -> dict[str, float]:
    """Return "dice" and "dice/<label>", means over patients, or "auc" and "accuracy".

    "auc" is left out where the held-out patients have one class only, and nothing is returned for no patients.
    """
    scores = list(scores)
    if not scores:
        return {}
    return _summarise_dice(scores) if scores[0].dice is not None else _summarise_classes(scores)


def metric_names(task: str, labels: Mapping[int, str]) -> tuple[str, ...]:
    """Return the names that `summarise` may give for a task, whatever patients there are."""
    if task == "classification":
        return ("auc", "accuracy")
    return ("dice", *(f"dice/{name}" for name in labels.values()))


def headline_of_shared(summary: Mapping[str, float]) -> dict[str, float]:
    """Return the headline of a summary under a name that says that it is of the shared model."""
    return next(({f"{name}_shared": summary[name]} for name in HEADLINES if name in summary), {})


def _summarise_dice(scores: Sequence[PatientScore]) -> dict[str, float]:
    return _mean_table([score.figures for score in scores])


def _summarise_classes(scores: Sequence[PatientScore]) -> dict[str, float]:
    probabilities = np.array([score.probabilities for score in scores])
    truth = np.array([score.truth for score in scores])
    # A figure of what is not a number is none: argmax would name a class.
    is_known = bool(np.isfinite(probabilities).all())
    summary = {"accuracy": float((probabilities.argmax(axis=1) == truth).mean()) if is_known else math.nan}
    auc = area_under_curve(probabilities, truth)
    return summary if auc is None else {"auc": auc, **summary}


def area_under_curve(probabilities: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> float | None:
    """Return the area under the ROC curve, for more than two classes the mean of one against the rest.

    Args:
      probabilities: [N, L]; truth: [N]. None when fewer than two classes occur, NaN where one is not a number.
    """
    if not np.isfinite(probabilities).all():
        return math.nan
    from sklearn.metrics import roc_auc_score

    present = np.unique(truth)
    if len(present) < 2:
        return None
    positives = [1] if probabilities.shape[1] == 2 else present
    return float(np.mean([roc_auc_score(truth == value, probabilities[:, value]) for value in positives]))
