"""What a search amounts to, as its report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medfl_ray.privacy.account import epsilon_words

NAMES = {
    "epsilon": "epsilon",
    "noise_multiplier": "noise multiplier",
    "learning_rate": "learning rate",
    "clip_norm": "clip norm",
    "local_steps": "local steps",
    "strategy": "strategy",
    "width": "network width",
}


@dataclass(frozen=True)
class TrialRow:
    """One trial. Epsilon and bytes are those of its whole run; the Dice of one that was stopped is its last round's."""

    number: int
    state: str
    parameters: Mapping[str, float | int | str]
    epsilon: float
    dice: float
    low: float
    high: float
    size_bytes: float
    rounds: int
    on_front: bool = False
    recommended: bool = False
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether all its rounds were trained and scored."""
        return self.state == "finished"


@dataclass(frozen=True)
class SearchSummary:
    """Everything that the report of a search says.

    delta: the largest of the hospitals'. selected: the epsilon of what is released, where only the best trial is.
    importance: share of the differences in Dice that each parameter explains; None for too few trials.
    failed: trial number and reason.
    """

    name: str
    rows: Sequence[TrialRow]
    failed: Mapping[int, str]
    num_trials: int
    planned_rounds: int
    accounting: str
    words: str
    delta: float
    worst_case: Mapping[str, float]
    selected: float | None
    importance: Mapping[str, float] | None
    judged_on: str
    recommended_text: str
    config_text: str
    wanted_dice: float | None

    @property
    def finished(self) -> list[TrialRow]:
        """The trials with a final score."""
        return [row for row in self.rows if row.finished]

    @property
    def front(self) -> list[TrialRow]:
        """The finished trials that no other one beats, the smallest epsilon first."""
        return sorted((row for row in self.rows if row.on_front), key=lambda row: row.epsilon)

    @property
    def best(self) -> TrialRow | None:
        """The recommended trial."""
        return next((row for row in self.rows if row.recommended), None)

    @property
    def terms(self) -> str:
        """What is shown with every epsilon."""
        return f"unit patient, delta {self.delta:.2g}, adjacency add/remove"


def parameter_words(name: str, value: float | int | str) -> str:
    """Return a parameter's value as people read it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def megabytes(size_bytes: float) -> str:
    """Return bytes in MB, with as many digits as tell trials apart."""
    value = size_bytes / 1e6
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def up(epsilon: float) -> str:
    """Return an epsilon rounded up to two digits, so that it never reads as less than it is."""
    return epsilon_words(epsilon)
