"""Scores and summaries against hand-computed numbers."""

from __future__ import annotations

import numpy as np
import pytest

from medfl_ray.training.scoring.evaluation import PatientScore, average_cases, dice_per_label, summarise

LABELS = {1: "core", 2: "rim"}


def test_dice_per_label() -> None:
    prediction, truth = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    assert dice_per_label(prediction, truth, LABELS) == {"core": pytest.approx(2 / 3), "rim": 1.0}
    assert dice_per_label(truth * 0, truth, LABELS)["core"] == 0.0


def test_cases_of_a_patient_are_averaged_before_patients() -> None:
    two_cases = average_cases([PatientScore(dice={"core": 1.0}), PatientScore(dice={"core": 0.0})])
    assert two_cases.dice == {"core": 0.5}
    assert summarise([two_cases, PatientScore(dice={"core": 1.0})]) == {"dice": 0.75, "dice/core": 0.75}


def test_mean_over_labels_then_patients() -> None:
    scores = [PatientScore(dice={"core": 1.0, "rim": 0.5}), PatientScore(dice={"core": 0.0, "rim": 0.5})]
    assert summarise(scores) == {"dice": 0.5, "dice/core": 0.5, "dice/rim": 0.5}
    assert scores[0].headline == 0.75


def test_classification() -> None:
    scores = [PatientScore(probabilities=(1 - p, p), truth=t) for p, t in [(0.9, 1), (0.4, 1), (0.6, 0), (0.1, 0)]]
    assert summarise(scores) == {"auc": 0.75, "accuracy": 0.5}
    assert scores[1].headline == 0.4
    assert summarise(scores[:2]) == {"accuracy": 0.5}


def test_three_classes_are_averaged_one_against_the_rest() -> None:
    scores = [PatientScore(probabilities=tuple(np.eye(3)[t]), truth=t) for t in (0, 1, 2)]
    assert summarise(scores)["auc"] == 1.0


def test_classes_of_several_cases() -> None:
    cases = [PatientScore(probabilities=(0.8, 0.2), truth=0), PatientScore(probabilities=(0.2, 0.8), truth=1)]
    assert average_cases(cases) == PatientScore(probabilities=(0.5, 0.5), truth=1)


def test_nobody_held_out() -> None:
    assert summarise([]) == {}
