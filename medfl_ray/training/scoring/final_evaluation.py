"""The last evaluation of a run at one hospital: all figures that were asked for, and the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from medfl_ray.config.run import RunConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.messages import ReliabilityBins
from medfl_ray.params import Vector, load_into
from medfl_ray.training.local_data import LocalData
from medfl_ray.training.scoring.calibration import ReliabilityCounter
from medfl_ray.training.scoring.evaluation import PatientScore, average_cases, dice_per_label
from medfl_ray.training.scoring.inference import classify, segment
from medfl_ray.training.scoring.segmentation_metrics import case_figures
from medfl_ray.training.trainer import Trainer


@dataclass(frozen=True)
class FullEvaluation:
    """Scores of the held-out patients, in the order of their first case; `bins` are empty without calibration."""

    scores: list[PatientScore]
    bins: dict[str, ReliabilityBins] = field(default_factory=dict)


def evaluate_fully(trainer: Trainer, weights: Vector, data: LocalData, run: RunConfig) -> FullEvaluation:
    """Score the held-out patients with every figure of the configuration, one case at a time."""
    load_into(trainer.network, weights)
    trainer.network.eval()
    classes = dict(data.labels)
    first = 1 if run.data.task == "segmentation" or len(classes) == 1 else 0
    names = [classes.get(value, f"class {value}") for value in range(first, max(classes, default=1) + 1)]
    counter = ReliabilityCounter(names) if run.evaluation.calibration else None
    per_patient: dict[str, list[PatientScore]] = {}
    for case in data.holdout:
        if case.label is None:
            continue
        probabilities = _probabilities(trainer, case, run)
        if counter is not None:
            counter.add(probabilities, torch.as_tensor(np.asarray(case.label)).long(), first)
        per_patient.setdefault(case.patient_id, []).append(_score(probabilities, case, classes, run))
    scores = [average_cases(scores) for scores in per_patient.values()]
    return FullEvaluation(scores, counter.bins() if counter is not None else {})


def _probabilities(trainer: Trainer, case: PreparedCase, run: RunConfig) -> torch.Tensor:
    """Return probabilities [L, *S] of a segmentation, [L] of a classification."""
    image = torch.from_numpy(case.image[None]).to(trainer.device)
    with torch.inference_mode():
        if run.data.task == "classification":
            return classify(trainer.network, image, run.patch_size)[0].cpu()
        return torch.softmax(segment(trainer.network, image, run.patch_size)[0], dim=0).cpu()


def _score(probabilities: torch.Tensor, case: PreparedCase, labels: dict[int, str], run: RunConfig) -> PatientScore:
    truth: Any = np.asarray(case.label)
    if run.data.task == "classification":
        return PatientScore(probabilities=tuple(probabilities.tolist()), truth=int(truth))
    prediction = probabilities.argmax(0).to(torch.uint8).numpy()
    score = PatientScore(dice=dice_per_label(prediction, truth, labels))
    wanted = run.evaluation.more_metrics
    if not wanted:
        return score
    spacing: Sequence[float] = case.spacing_mm
    return replace(
        score,
        more=case_figures(prediction, truth, labels, spacing, wanted, run.evaluation.surface_tolerance_mm),
    )
