"""Where a model version comes from: run, data sets, privacy, strategy and figures, as the registry signs them."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, field_serializer

from medfl_ray.messages import Label
from medfl_ray.privacy.account import INFINITE, Spending, epsilon_words, split_words, terms

LOWER_IS_BETTER = ("loss", "train_loss", "hausdorff", "hd95", "brier", "ece")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSet(_Part):
    """What one hospital trained on, in public words.

    `fingerprint` is 64 hex digits. `of` says of what: of public or synthetic files' contents or, where they are many,
    their names and sizes; of the recipe of phantoms; of what a hospital declares of private data. A hash of private
    contents would tell whether one patient was added or taken away, which differential privacy keeps back.
    """

    name: str
    declared: Literal["private", "public", "synthetic"]
    num_patients: int
    fingerprint: str
    of: Literal["contents", "names and sizes", "recipe", "declaration"]


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("it is no number")
    return value


class EpsilonSpent(_Part):
    """What one hospital's data set has spent, everything ever charged to it included; None is what is not known.

    `epsilon` is the account's total, infinite where data left without patient-level protection; in JSON it is then the
    string "Infinity". `run` and `extra` are this run's rounds, and its baselines and studies, each with its budget;
    `budget` is that of the data set's life. Records of earlier versions have neither.
    """

    epsilon: Annotated[float, AfterValidator(_not_nan)] | None
    delta: FiniteFloat | None
    unit: str | None
    adjacency: str | None
    budget: FiniteFloat | None = None
    run: Spending | None = None
    extra: Spending | None = None
    moment: Literal["ledger", "receipt"] = "receipt"

    @field_serializer("epsilon", when_used="json")
    def _finite_json(self, epsilon: float | None) -> float | str | None:
        return "Infinity" if epsilon == math.inf else epsilon

    @field_serializer("run", "extra", when_used="json")
    def _finite_parts(self, part: Spending | None) -> Any:
        return None if part is None else json.loads(part.model_dump_json())

    @property
    def is_unprotected(self) -> bool:
        """Whether data were used without patient-level protection."""
        return self.epsilon == math.inf

    @property
    def missing(self) -> tuple[str, ...]:
        """What a reader would have to guess."""
        sound = {
            "epsilon": self.epsilon is not None and self.epsilon >= 0,
            "delta": self.delta is not None and 0 < self.delta < 1,
            "unit": self.unit in ("patient", "hospital"),
            "adjacency": self.adjacency in ("add_remove", "zero_out"),
        }
        return tuple(name for name, is_sound in sound.items() if not is_sound)

    def __str__(self) -> str:
        """Epsilon with unit, delta and adjacency beside it, and what of it is this run's."""
        if self.missing:
            return f"incomplete: {', '.join(self.missing)}"
        assert self.epsilon is not None
        assert self.delta is not None
        shown = terms(str(self.unit), self.delta, str(self.adjacency))
        parts = split_words(
            Spending(epsilon=self.epsilon, delta=self.delta, budget=self.budget), self.run, self.extra, 3
        )
        return f"epsilon {epsilon_words(self.epsilon, 3)} ({shown}; {parts})"


class PrivacyRecord(_Part):
    """Whether the weights were trained with differential privacy, and what each hospital spent.

    Under hospital-level privacy `spent` has one entry, the federation's. `unprotected` are the hospitals whose data
    were used without patient-level protection: their patient-level epsilon is infinite.
    """

    differential_privacy: bool
    unit: str | None = None
    spent: dict[str, EpsilonSpent] = Field(default_factory=dict)
    unprotected: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The largest epsilon with its unit, delta and adjacency, or that there is none."""
        exposed = f"; patient-level epsilon {INFINITE} at {', '.join(self.unprotected)}" if self.unprotected else ""
        if not self.differential_privacy:
            return f"no differential privacy{exposed}"
        gaps = [spent for spent in self.spent.values() if spent.missing]
        largest = max(self.spent.values(), key=lambda spent: spent.epsilon or 0, default=None)
        return ("not known" if largest is None else str(gaps[0] if gaps else largest)) + exposed


class Figure(_Part):
    """A mean over patients with its 95 % interval, and what showing it costs; None where it is not shown or known."""

    value: FiniteFloat | None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    label: Label

    @property
    def text(self) -> str:
        """The figure as a table shows it."""
        if self.value is None:
            return self.label
        interval = f" ({self.low:.4f} to {self.high:.4f})" if self.low is not None and self.high is not None else ""
        return f"{self.value:.4f}{interval}"


class ParityRecord(_Part):
    """How the exported model compares with the trained one; see export/parity.py."""

    max_abs_difference: FiniteFloat
    agreement: FiniteFloat
    dice: FiniteFloat
    num_patches: int
    images: str


class Lineage(_Part):
    """Everything that is known of a version's origin.

    metrics: means over hospitals that show them, or of an evaluation on other images, which `metrics_of` names.
    hospital_metrics: hospital -> metric -> figure. receipts_head: hash of the run's last receipt.
    """

    task: Literal["segmentation", "classification"]
    run: str
    round: int
    config_hash: str
    strategy: str
    weights_checksum: str
    receipts_head: str
    receipts_key: str
    data_sets: dict[str, DataSet]
    privacy: PrivacyRecord
    metrics: dict[str, Figure]
    metrics_of: str
    hospital_metrics: dict[str, dict[str, Figure]]
    parity: ParityRecord | None
    medfl_ray: str


def is_better(metric: str, first: float, second: float) -> bool:
    """Say whether the first value of a metric is better than the second."""
    return first < second if metric.partition("/")[0] in LOWER_IS_BETTER else first > second
