"""The evaluation of a run as a paper reports it, read from its folder: intervals, models side by side, fairness.

A figure that a hospital suppresses has no value here, and nothing is pooled over hospitals of which one does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfl_ray.analytics.summary import BaselineFigures, Curve, RunSummary, read_as
from medfl_ray.messages import ReliabilityBins, SiteEvaluation
from medfl_ray.study_records import STOPPING_FILE, STUDIES_FILE, StoppingRecord, StudiesRecord
from medfl_ray.training.scoring.intervals import Intervals, intervals_of_means


@dataclass(frozen=True)
class Estimate:
    """A mean over patients with its 95 % bootstrap interval; without one where single patients are not known."""

    mean: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class ModelRow:
    """One model, or kind of model, over all hospitals that show its score.

    pooled: over all patients. worst: the hospital with the lowest score. deviation: sample SD over hospitals.
    """

    name: str
    pooled: Estimate | None
    mean: float
    worst: str
    low: float
    high: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Target:
    """When a target was reached: the first round of each, None where it never was or nothing is known."""

    value: float
    federated: int | None
    central: int | None
    has_central: bool


@dataclass(frozen=True)
class EvaluationSummary:
    """What the run's folder says of its evaluation."""

    run: RunSummary
    sites: Mapping[str, SiteEvaluation]
    baselines: BaselineFigures
    studies: StudiesRecord
    stopping: StoppingRecord | None

    @property
    def pooled(self) -> dict[str, Estimate]:
        """Every figure over the patients of all hospitals; nothing where one shows no patients."""
        sites = list(self.sites.values())
        if not sites or any(site.patients is None for site in sites):
            return {}
        return estimates([row for site in sites for row in site.patients or ()])

    @property
    def models(self) -> tuple[ModelRow, ...]:
        """Federated, local-only and central, and the federation that never saw the hospital, side by side."""
        hospitals = [h.hospital for h in self.run.hospitals]
        federated = {h.hospital: h.federated for h in self.run.hospitals}
        local = {h.hospital: h.local for h in self.run.hospitals}
        central = {h.hospital: h.central for h in self.run.hospitals}
        patients = {name: site.patient_scores for name, site in self.sites.items()}
        own = {name: baseline.patient_scores for name, baseline in self.baselines.local.items()}
        pooled = self.baselines.central.patient_scores if self.baselines.central else {}
        rows = (
            _model_row("federated", federated, patients, hospitals),
            _model_row("local only", local, own, hospitals),
            _model_row("central", central, pooled, hospitals),
            _model_row("federated without the hospital", self.studies.leave_one_out, {}, hospitals),
        )
        return tuple(row for row in rows if row is not None)

    @property
    def reliability(self) -> dict[str, ReliabilityBins]:
        """Bins per class, added up over the hospitals that show them."""
        found: dict[str, ReliabilityBins] = {}
        for site in self.sites.values():
            for name, bins in (site.calibration or {}).items():
                found[name] = add_bins(found[name], bins) if name in found else bins
        return found

    @property
    def target(self) -> Target | None:
        """When the run and its central baseline reached the target Dice; None without a target."""
        value = self.run.config.evaluation.target_dice
        if value is None:
            return None
        return Target(
            value,
            rounds_to(self.run.mean_curve, value),
            rounds_to(self.central_curve, value),
            bool(self.central_curve),
        )

    @property
    def central_curve(self) -> Curve:
        """Score of the central baseline on all patients, per round."""
        curve = self.baselines.central.curve if self.baselines.central else {}
        return tuple(sorted(curve.items()))


def summarise_evaluation(run_dir: Path, run: RunSummary) -> EvaluationSummary:
    """Read what a run's folder says of its evaluation.

    Raises:
      ConfigError: a file is damaged.
    """
    return EvaluationSummary(
        run=run,
        sites=read_as(run_dir / "evaluation.json", dict[str, SiteEvaluation]) or {},
        baselines=read_as(run_dir / "baselines.json", BaselineFigures) or BaselineFigures(),
        studies=read_as(run_dir / STUDIES_FILE, StudiesRecord) or StudiesRecord(),
        stopping=read_as(run_dir / STOPPING_FILE, StoppingRecord),
    )


def estimates(rows: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Return mean and interval of every figure over patients, given as one table each."""
    intervals: Intervals = intervals_of_means(rows)
    return {
        name: Estimate(statistics.fmean(row[name] for row in rows), low, high, len(rows))
        for name, (low, high) in intervals.items()
    }


def site_estimates(site: SiteEvaluation) -> dict[str, Estimate]:
    """Return every figure that a hospital shows, with the interval that it computed itself."""
    count = len(site.patients) if site.patients is not None else None
    found = {}
    for name, metric in site.metrics.items():
        if metric.value is not None:
            low, high = (site.intervals or {}).get(name, (None, None))
            found[name] = Estimate(metric.value, low, high, count)
    return found


def rounds_to(curve: Iterable[tuple[int, float]], target: float) -> int | None:
    """Return the first round whose score reaches the target."""
    return next((number for number, value in curve if value >= target), None)


def add_bins(one: ReliabilityBins, other: ReliabilityBins) -> ReliabilityBins:
    """Return the bins of both together."""
    return ReliabilityBins(
        counts=tuple(a + b for a, b in zip(one.counts, other.counts, strict=True)),
        sum_probability=tuple(a + b for a, b in zip(one.sum_probability, other.sum_probability, strict=True)),
        num_true=tuple(a + b for a, b in zip(one.num_true, other.num_true, strict=True)),
    )


def expected_calibration_error(bins: ReliabilityBins) -> float:
    """Return the mean distance between predicted probability and observed share, bins weighted by their counts.

    Source: Guo et al. 2017, arXiv:1706.04599; for one class of several, Nixon et al. 2019, arXiv:1904.01685.
    """
    total = sum(bins.counts)
    if total == 0:
        return 0.0
    return sum(abs(p - t) for p, t in zip(bins.sum_probability, bins.num_true, strict=True)) / total


def _model_row(
    name: str,
    metrics: Mapping[str, object],
    patients: Mapping[str, Sequence[float] | None],
    hospitals: Sequence[str],
) -> ModelRow | None:
    values = {h: value for h in hospitals if (value := getattr(metrics.get(h), "value", None)) is not None}
    if not values:
        return None
    worst = min(values, key=lambda h: (values[h], h))
    rows = [{"score": score} for h in values for score in patients.get(h) or ()]
    complete = all(patients.get(h) for h in values)
    return ModelRow(
        name=name,
        pooled=estimates(rows)["score"] if complete else None,
        mean=statistics.fmean(values.values()),
        worst=worst,
        low=values[worst],
        high=max(values.values()),
        deviation=statistics.stdev(values.values()) if len(values) > 1 else 0.0,
        count=len(values),
    )
