"""The report's part on evaluation: pictures, tables and what their figures mean; the same as files in the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medfl_ray.analytics.evaluation_figures import NAMES, Drawing, drawings
from medfl_ray.analytics.evaluation_summary import (
    Estimate,
    EvaluationSummary,
    ModelRow,
    Target,
    expected_calibration_error,
    summarise_evaluation,
)
from medfl_ray.analytics.evaluation_tables import write_tables
from medfl_ray.analytics.figures import Chart
from medfl_ray.analytics.summary import RunSummary
from medfl_ray.study_records import ContributionRecord

FOLDER = "figures"
DEFINITIONS = {
    "dice": "Dice: overlap of prediction and truth, twice the common part over both; 1 where both are empty.",
    "precision": "Precision: share of the prediction that is right; 1 where both are empty, 0 where one is.",
    "recall": "Recall: share of the truth that is found; 1 where both are empty, 0 where one is.",
    "volume_error": "Volume error: absolute difference of the volumes in ml, in two dimensions of the areas in cm2.",
    "hd95": "HD95: the larger of both 95th percentiles of surface distances in mm; 0 where both are empty, the "
    "image's diagonal where one is.",
    "surface_dice": "Surface Dice: share of both surfaces within {tolerance:g} mm of the other; 1 where both are "
    "empty, 0 where one is.",
}


@dataclass(frozen=True)
class EvaluationPart:
    """What the report's template shows of an evaluation."""

    charts: tuple[Chart, ...]
    pooled: dict[str, Estimate]
    models: tuple[ModelRow, ...]
    definitions: tuple[str, ...]
    contributions: str
    calibration: str
    target: str
    stopping: str
    problems: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.charts or self.pooled or len(self.models) > 1)


def evaluation_part(run_dir: Path, run: RunSummary) -> EvaluationPart:
    """Read a run's evaluation, write its pictures and tables into its folder, and return what the report shows.

    Raises:
      ConfigError: a file is damaged.
    """
    summary = summarise_evaluation(run_dir, run)
    drawn = drawings(summary)
    write_tables(run_dir, summary)
    _write_pictures(run_dir / FOLDER, drawn)
    pooled = summary.pooled
    named = [name for name in DEFINITIONS if name in pooled]
    tolerance = run.config.evaluation.surface_tolerance_mm
    return EvaluationPart(
        charts=tuple(drawing.chart for drawing in drawn),
        pooled=pooled,
        models=summary.models,
        definitions=tuple(DEFINITIONS[name].format(tolerance=tolerance) for name in named),
        contributions=contribution_words(summary.studies.contributions),
        calibration=calibration_words(summary),
        target=target_words(summary.target),
        stopping=stopping_words(summary),
        problems=summary.studies.problems,
    )


def contribution_words(record: ContributionRecord | None) -> str:
    """Say how contributions were estimated and how sure they are; empty without any."""
    if record is None:
        return ""
    over = "over all patients" if record.over_patients else "over hospitals"
    basis = f"from {record.num_federations} federations of {record.rounds} rounds each; scores are means {over}"
    if record.method == "leave_one_out":
        return (
            f"Contributions are estimates: the score of all hospitals ({record.value_of_all:.3f}) minus that of a "
            f"federation without the hospital, {basis}. Each was trained once, so that there is no standard error."
        )
    orders = (
        f"all {record.num_orders} orders of the hospitals were used, so that no error comes from sampling orders"
        if record.all_orders
        else f"{record.num_orders} random orders were used; the error bars are standard errors over them"
    )
    truncated = (
        f", {record.num_truncated} of them broken off once little was left to gain" if record.num_truncated else ""
    )
    return (
        f"Contributions are Shapley values, estimated {basis}: {orders}{truncated}. They share out the way from "
        f"{record.value_of_none or 0.0:.3f} of untrained weights to {record.value_of_all:.3f}. Training again with "
        "another seed would move them; that is in no error bar."
    )


def calibration_words(summary: EvaluationSummary) -> str:
    """Name the expected calibration error per class; empty where none may be shown."""
    bins = summary.reliability
    if not bins:
        return ""
    each = ", ".join(f"{name} {expected_calibration_error(one):.4f}" for name, one in bins.items())
    unit = "voxels" if summary.run.config.data.task == "segmentation" else "images"
    return (
        f"Expected calibration error per class over all held-out {unit}: {each}. Most {unit} may be easy, which makes "
        "it small; the diagram shows each probability by itself."
    )


def target_words(target: Target | None) -> str:
    """Say when the run and its central baseline reached the target; empty without a target."""
    if target is None:
        return ""
    federated = (
        f"the federated model reached a mean Dice of {target.value:g} in round {target.federated}"
        if target.federated is not None
        else f"the federated model did not reach a mean Dice of {target.value:g}"
    )
    if not target.has_central:
        return f"Rounds to target: {federated}; no central baseline was trained beside it."
    central = f"in round {target.central}" if target.central is not None else "in none of its rounds"
    return (
        f"Rounds to target: {federated}, the central model {central}, each central round having all hospitals' steps."
    )


def stopping_words(summary: EvaluationSummary) -> str:
    """Say how the run ended and whose weights were kept, where the configuration left that to the scores."""
    record = summary.stopping
    if record is None:
        return ""
    ended = f"The run {record.reason}." if record.stopped_early else f"The run took all {record.last_round} rounds."
    if record.best_round is None or record.best_score is None:
        return ended
    return (
        f"{ended} Best mean score: {record.best_score:.4f} in round {record.best_round}. Kept and exported: the "
        f"weights of round {record.kept_round}."
    )


def _write_pictures(folder: Path, drawn: list[Drawing]) -> None:
    for name in NAMES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for drawing in drawn:
        folder.mkdir(exist_ok=True)
        part = folder / f".{drawing.name}.{os.getpid()}.part"
        part.write_bytes(drawing.png)
        part.replace(folder / f"{drawing.name}.png")
