"""What crosses a boundary: plans, updates, failures, evaluations and receipts.

No message holds an image, a patient or case identifier, or a path. Every figure that leaves a
hospital is a `Metric` with a label that says what it costs to show it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medfl_ray.params import Vector

Label = Literal["public", "charged", "suppressed", "unprotected"]
"""public: derived from public or synthetic data. charged: paid for in the ledger. suppressed: not
shown. unprotected: private data of a run whose differential privacy is off."""


class Message(BaseModel):
    """A frozen, JSON-serialisable message."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(Message):
    """One figure and what showing it costs; `value` is None exactly when it is suppressed."""

    value: float | None
    label: Label


class Mechanism(Message):
    """The patient-level subsampled Gaussian mechanism of one hospital in one round.

    Noise has standard deviation noise_multiplier * max_grad_norm on the sum of clipped patient
    gradients; each of num_steps steps draws every patient with probability sample_rate.
    """

    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    num_steps: int
    num_patients: int
    delta: float
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"


class RoundPlan(Message):
    """What a round is going to do, fixed before any hospital trains."""

    job: str
    round: int
    attempt: int
    config_hash: str
    weights_checksum: str
    hospitals: tuple[str, ...]
    num_steps: dict[str, int]
    learning_rate: float
    mechanisms: dict[str, Mechanism]
    deadline_s: float | None = None


class PrivacySpent(Message):
    """Cumulative privacy loss of one hospital's data set, reservations included.

    `ledger_head` names the last row of the ledger behind the figure, so that receipts remember how far it went.
    """

    epsilon: float
    delta: float
    budget: float | None
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"
    ledger_head: str | None = None


class HospitalInfo(Message):
    """What a hospital says of itself before the first round; only public figures."""

    hospital: str
    declared: Literal["private", "public", "synthetic"]
    data_set: str
    num_patients: int
    num_channels: int
    labels: dict[int, str]
    layout_checksum: str
    device: str
    spent: PrivacySpent | None = None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """One hospital's change of the weights, delta of shape [P], with its public weight.

    `duration_s` is 0 for private data under DP: it would tell how many patients were drawn.
    """

    hospital: str
    round: int
    attempt: int
    delta: Vector
    layout_checksum: str
    num_patients: int
    num_steps: int
    spent: PrivacySpent | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    duration_s: float = 0.0


class ClientFailure(Message):
    """A hospital that delivered nothing in this round, and why."""

    hospital: str
    round: int
    attempt: int
    stage: Literal["start", "reserve", "train", "evaluate", "screen"]
    reason: str
    left_host: bool = True


class SiteEvaluation(Message):
    """One hospital's evaluation of given weights on its held-out patients."""

    hospital: str
    round: int
    metrics: dict[str, Metric]
    patient_scores: tuple[float, ...] | None = None
    pictures: tuple[bytes, ...] = ()


class Receipt(Message):
    """The record of one round: who was asked, who trained, who did not and why."""

    job: str
    round: int
    attempt: int
    plan_hash: str
    config_hash: str
    asked: tuple[str, ...]
    trained: tuple[str, ...]
    failures: tuple[ClientFailure, ...]
    update_hashes: dict[str, str]
    spent: dict[str, PrivacySpent]
    weights_before: str
    weights_after: str | None
    published: bool
    ended_at: str


class RoundResult(Message):
    """A closed round as the run's loop, the display and the report see it."""

    round: int
    receipt: Receipt
    metrics: dict[str, dict[str, Metric]]
    duration_s: float
