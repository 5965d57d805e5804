"""The evaluation of a run as CSV files: one per table, in the folder tables/ of the run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from medfl_ray.analytics.evaluation_summary import (
    Estimate,
    EvaluationSummary,
    expected_calibration_error,
    site_estimates,
)

Row = Sequence[object]
FOLDER = "tables"


def write_tables(run_dir: Path, summary: EvaluationSummary) -> None:
    """Write the tables that the run has figures for; those of an earlier report that it has none for are removed."""
    folder = run_dir / FOLDER
    found = tables(summary)
    for name in found:
        (folder / name).unlink(missing_ok=True)
    for name, rows in found.items():
        if len(rows) < 2:
            continue
        folder.mkdir(exist_ok=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[_text(value) for value in row] for row in rows])
        part = folder / f".{name}.{os.getpid()}.part"
        part.write_text(text.getvalue(), encoding="utf-8")
        part.replace(folder / name)


def tables(summary: EvaluationSummary) -> dict[str, list[Row]]:
    """Return the rows of each file, the header first; a file without more is not written."""
    return {
        "hospitals.csv": _hospitals(summary),
        "pooled.csv": _pooled(summary.pooled),
        "patients.csv": _patients(summary),
        "models.csv": _models(summary),
        "fairness.csv": _fairness(summary),
        "cross_site.csv": _cross_site(summary),
        "contributions.csv": _contributions(summary),
        "calibration.csv": _calibration(summary),
        "rounds.csv": _rounds(summary),
    }


def _text(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _bounds(estimate: Estimate) -> Row:
    return (estimate.mean, estimate.low, estimate.high, estimate.count)


def _hospitals(summary: EvaluationSummary) -> list[Row]:
    rows: list[Row] = [("hospital", "figure", "mean", "low_95", "high_95", "patients", "label")]
    for name, site in sorted(summary.sites.items()):
        known = site_estimates(site)
        for figure, metric in site.metrics.items():
            estimate: Row = _bounds(known[figure]) if figure in known else (None,) * 4
            rows.append((name, figure, *estimate, metric.label))
    return rows


def _pooled(pooled: Mapping[str, Estimate]) -> list[Row]:
    header = ("figure", "mean", "low_95", "high_95", "patients")
    return [header, *((name, *_bounds(estimate)) for name, estimate in pooled.items())]


def _patients(summary: EvaluationSummary) -> list[Row]:
    shown = {name: site.patients for name, site in sorted(summary.sites.items()) if site.patients}
    figures = list(dict.fromkeys(figure for rows in shown.values() for row in rows for figure in row))
    return [
        ("hospital", "patient", *figures),
        *(
            (name, number, *(row.get(figure) for figure in figures))
            for name, rows in shown.items()
            for number, row in enumerate(rows, start=1)
        ),
    ]


def _models(summary: EvaluationSummary) -> list[Row]:
    header = ("model", "pooled", "low_95", "high_95", "patients", "mean", "sd", "worst_hospital", "worst", "best")
    rows: list[Row] = [header]
    for row in summary.models:
        pooled: Row = _bounds(row.pooled) if row.pooled else (None,) * 4
        rows.append((row.name, *pooled, row.mean, row.deviation, row.worst, row.low, row.high))
    return rows


def _fairness(summary: EvaluationSummary) -> list[Row]:
    rows: list[Row] = [("hospital", "federated", "local_only", "central", "gain_over_local", "federated_without_it")]
    without = summary.studies.leave_one_out
    for h in summary.run.hospitals:
        values = [metric.value if metric is not None else None for metric in (h.federated, h.local, h.central)]
        left_out = without[h.hospital].value if h.hospital in without else None
        if any(value is not None for value in (*values, left_out)):
            rows.append((h.hospital, *values, h.gain, left_out))
    return rows


def _cross_site(summary: EvaluationSummary) -> list[Row]:
    matrix = summary.studies.cross_site
    rows: list[Row] = [("model_of", "scored_on", summary.run.metric, "label")]
    for owner, scores in matrix.items():
        rows.extend((owner, hospital, metric.value, metric.label) for hospital, metric in scores.items())
    return rows


def _contributions(summary: EvaluationSummary) -> list[Row]:
    record = summary.studies.contributions
    rows: list[Row] = [("hospital", "contribution", "standard_error", "method", "orders", "all_orders", "federations")]
    if record is not None:
        rows.extend(
            (h, value, record.standard_errors.get(h), record.method, record.num_orders, record.all_orders,
             record.num_federations)
            for h, value in record.values.items()
        )  # fmt: skip
    return rows


def _calibration(summary: EvaluationSummary) -> list[Row]:
    rows: list[Row] = [("class", "bin_from", "bin_to", "count", "mean_probability", "observed_share", "ece")]
    for name, bins in summary.reliability.items():
        width, error = 1 / len(bins.counts), expected_calibration_error(bins)
        for place, (count, given, true) in enumerate(
            zip(bins.counts, bins.sum_probability, bins.num_true, strict=True)
        ):
            shares = (given / count, true / count) if count else (None, None)
            rows.append((name, place * width, (place + 1) * width, count, *shares, error))
    return rows


def _rounds(summary: EvaluationSummary) -> list[Row]:
    central, federated = dict(summary.central_curve), dict(summary.run.mean_curve)
    numbers = sorted(set(central) | set(federated))
    return [
        ("round", "federated_mean", "central"),
        *((number, federated.get(number), central.get(number)) for number in numbers),
    ]
