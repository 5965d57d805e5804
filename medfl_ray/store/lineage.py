"""Where a model version comes from: run, data sets, privacy, strategy and figures, as the registry signs them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from medfl_ray.messages import Label

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


class EpsilonSpent(_Part):
    """What one hospital's data set has spent, everything ever charged to it included; None is what is not known."""

    epsilon: FiniteFloat | None
    delta: FiniteFloat | None
    unit: str | None
    adjacency: str | None

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
        """Epsilon with unit, delta and adjacency beside it."""
        if self.missing:
            return f"incomplete: {', '.join(self.missing)}"
        adjacency = (self.adjacency or "").replace("_", "/")
        return f"epsilon {self.epsilon:.3f} ({self.unit}-level, {adjacency}, delta {self.delta:g})"


class PrivacyRecord(_Part):
    """Whether the weights were trained with differential privacy, and what each hospital spent.

    Under hospital-level privacy `spent` has one entry, the federation's.
    """

    differential_privacy: bool
    unit: str | None = None
    spent: dict[str, EpsilonSpent] = Field(default_factory=dict)

    @property
    def text(self) -> str:
        """The largest epsilon with its unit, delta and adjacency, or that there is none."""
        if not self.differential_privacy:
            return "no differential privacy"
        gaps = [spent for spent in self.spent.values() if spent.missing]
        largest = max(self.spent.values(), key=lambda spent: spent.epsilon or 0, default=None)
        return "not known" if largest is None else str(gaps[0] if gaps else largest)


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
