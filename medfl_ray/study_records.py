"""What the studies of a run leave in its folder, as the federation writes it and the report reads it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from medfl_ray.messages import Message, Metric, SiteEvaluation, mean_over_hospitals
from medfl_ray.params import Vector

STUDIES_FILE, STOPPING_FILE = "studies.json", "stopping.json"


@dataclass(frozen=True, eq=False)
class SavedResult:
    """A finished piece of what follows the rounds: a JSON document, and weights [P] where it is a model."""

    document: Mapping[str, Any]
    weights: Vector | None = None


class CoalitionRecord(Message):
    """A federation of some of the run's hospitals, and its model's score at all of them; none trained the first."""

    hospitals: tuple[str, ...]
    rounds: int
    evaluations: dict[str, SiteEvaluation]

    @property
    def over_patients(self) -> bool:
        """Whether every hospital shows its patients' scores, so that their mean can be taken."""
        return all(site.patient_scores for site in self.evaluations.values())

    @property
    def value(self) -> float | None:
        """The pooled score: mean over all patients, or over hospitals where patients are not shown; None if hidden."""
        if self.over_patients and self.evaluations:
            return statistics.fmean(v for site in self.evaluations.values() for v in site.patient_scores or ())
        return mean_over_hospitals({name: site.metrics for name, site in self.evaluations.items()})


class ContributionRecord(Message):
    """What each hospital adds to the pooled score: estimates, for a training repeated from elsewhere differs.

    standard_errors: over the orders that were drawn; None where every order was used, or none is.
    """

    method: Literal["leave_one_out", "shapley"]
    values: dict[str, float]
    standard_errors: dict[str, float | None]
    num_orders: int = 0
    all_orders: bool = False
    num_truncated: int = 0
    num_federations: int
    rounds: int
    value_of_all: float
    value_of_none: float | None = None
    over_patients: bool


class StudiesRecord(Message):
    """studies.json: model of a hospital -> hospital -> score; hospital -> score of the federation without it."""

    cross_site: dict[str, dict[str, Metric]] = Field(default_factory=dict)
    leave_one_out: dict[str, Metric] = Field(default_factory=dict)
    contributions: ContributionRecord | None = None
    problems: tuple[str, ...] = ()


class StoppingRecord(Message):
    """stopping.json: the best round by mean score over hospitals, the last one, and whose weights were kept."""

    best_round: int | None
    best_score: float | None
    last_round: int
    kept_round: int
    stopped_early: bool
    reason: str
