"""What crosses a boundary: plans, updates, failures, evaluations and receipts.

No message holds an image, a patient or case identifier, or a path. Every figure that leaves a
hospital is a `Metric` with a label that says what it costs to show it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medfl_ray.params import Vector

HEADLINES = ("dice", "auc", "accuracy")
"""What a run is judged by: the first of these that its evaluation has."""

Label = Literal["public", "charged", "suppressed", "unprotected"]
"""public: derived from public or synthetic data. charged: paid for in the ledger. suppressed: not
shown. unprotected: private data of a run whose differential privacy is off."""


PrivacyUnit = Literal["patient", "hospital"]
"""What one differing record is: one patient of one hospital, or one hospital with all its patients."""

Adjacency = Literal["add_remove", "zero_out"]
"""add_remove: a record is there or not. zero_out: a record is there, or zeros in its place (tree aggregation)."""


FailureStage = Literal["select", "start", "reserve", "train", "late", "surplus", "screen", "evaluate"]
"""Where a hospital's part in a round ended."""


class Message(BaseModel):
    """A frozen, JSON-serialisable message; in JSON text an infinite figure is the string "Infinity".

    An alias is a field's name in JSON, so that hashes, signatures and files of earlier versions stay valid.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        serialize_by_alias=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


class Metric(Message):
    """One figure and what showing it costs; `value` is None exactly when it is suppressed."""

    value: float | None
    label: Label


class Mechanism(Message):
    """The subsampled Gaussian mechanism of one hospital in one round, or of the coordinator at hospital level.

    Noise has standard deviation noise_multiplier * max_grad_norm on the sum of clipped patient
    gradients; each of num_steps steps draws every patient with probability sample_rate. At hospital level
    the sum is of hospitals' updates and num_records counts hospitals. With adjacency zero_out it is one tree over
    num_steps rounds, noise_multiplier per node.
    """

    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sample_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    num_steps: Annotated[int, Field(gt=0)]
    num_records: Annotated[int, Field(gt=0, alias="num_patients")]
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    unit: PrivacyUnit = "patient"
    adjacency: Adjacency = "add_remove"


class RoundPlan(Message):
    """What a round is going to do, fixed before any hospital trains.

    `ledger_heads` names the last row of each hospital's ledger that the coordinator has seen: a ledger that lacks
    it does not train, and one that has it sends the rows behind it. `clip_norm` bounds a hospital's whole update,
    under hospital-level differential privacy. With over-selection the round closes after `enough` updates.
    """

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
    enough: int | None = None
    clip_norm: float | None = None
    ledger_heads: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan, in hex; receipts name it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def receipt_fields(self) -> dict[str, Any]:
        """What a receipt takes from the plan, whatever became of the round."""
        return {
            "job": self.job,
            "round": self.round,
            "attempt": self.attempt,
            "plan_hash": self.digest,
            "config_hash": self.config_hash,
            "asked": self.hospitals,
            "weights_before": self.weights_checksum,
        }

    def among(self, hospitals: Sequence[str]) -> RoundPlan:
        """Return the plan for some of its hospitals, who are asked again."""
        return self.model_copy(update={"hospitals": tuple(hospitals)})

    def addressed_to(self, hospital: str) -> RoundPlan:
        """Return what one hospital is told: of ledgers the head of its own alone.

        Under hospital-level DP neither who else was asked, which may be secret.
        """
        heads = {name: head for name, head in self.ledger_heads.items() if name == hospital}
        own = self.model_copy(update={"ledger_heads": heads})
        if self.clip_norm is None:
            return own
        return own.model_copy(update={"hospitals": (hospital,), "num_steps": {hospital: self.num_steps[hospital]}})


class LedgerRows(Message):
    """The newest rows of one ledger, each as the hospital signed it, for the coordinator's mirror."""

    hospital: str
    data_set: str
    public_key: str
    events: tuple[dict[str, Any], ...]


class PrivacySpent(Message):
    """Cumulative privacy loss of one hospital's data set, or of the federation's hospitals, reservations included.

    `epsilon` is infinite once something of the data left without protection. `ledger_head` names the last row of the
    ledger behind the figure, so that receipts remember how far it went. `ledger_rows` travel to the coordinator's
    mirror and are taken off there: no receipt holds them.
    """

    epsilon: float
    delta: float
    budget: float | None
    unit: PrivacyUnit = "patient"
    adjacency: Adjacency = "add_remove"
    ledger_head: str | None = None
    ledger_rows: tuple[LedgerRows, ...] = ()

    @property
    def is_unprotected(self) -> bool:
        """Whether something left without protection, so that no epsilon bounds what was revealed."""
        return math.isinf(self.epsilon)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON document, in which an infinite epsilon is the string "Infinity"."""
        plain: dict[str, Any] = json.loads(self.model_dump_json())
        return plain


class HospitalInfo(Message):
    """What a hospital says of itself before the first round; only public figures.

    `patient_group_size` is how many patients' gradients its machine computes in one pass, measured on made-up
    patients; None without patient-level differential privacy. `hospitals_per_group` is how many virtual hospitals
    are trained at once, None outside of a simulation. `public_key` is the Ed25519 key, 64 hex digits, under which it
    signs its updates; None where updates are summed where they are trained.
    """

    hospital: str
    declared: Literal["private", "public", "synthetic"]
    data_set: str
    num_patients: int
    num_channels: int
    labels: dict[int, str]
    layout_checksum: str
    device: str
    patient_group_size: int | None = None
    hospitals_per_group: int | None = None
    public_key: str | None = None
    spent: PrivacySpent | None = None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """One hospital's change of the weights, delta of shape [P], with its public weight.

    `duration`, in seconds, is a figure like any other: it tells how many patients were drawn. `within_clip` says
    whether the update fitted the plan's clip norm before it was clipped; None where there is none. `signature` is the
    hospital's, over what `federation.signatures.update_digest` returns.
    """

    hospital: str
    round: int
    attempt: int
    delta: Vector
    layout_checksum: str
    aggregation_weight: int
    num_steps: int
    spent: PrivacySpent | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    duration: Metric | None = None
    within_clip: bool | None = None
    signature: str = ""


class ClientFailure(Message):
    """A hospital that delivered nothing in this round, and why; `config_fault` where the configuration is to blame.

    `may_have_left` says whether anything computed from data may have left the hospital, `transient` whether the fault
    lay with a process or connection, so that asking again may help. At stage `select` a hospital was not asked because
    of its earlier failures; at stage `surplus` enough others had delivered.
    """

    hospital: str
    round: int
    attempt: int
    stage: FailureStage
    reason: str
    may_have_left: bool = Field(True, alias="left_host")
    config_fault: bool = False
    transient: bool = Field(False, alias="passing")


class ReliabilityBins(Message):
    """Predicted probabilities of one class in bins of equal width over [0, 1]: counts and sums, so that they add up.

    counts: predictions in each bin. sum_probability: the sum of them. num_true: how many were of the class.
    """

    counts: tuple[int, ...]
    sum_probability: tuple[float, ...]
    num_true: tuple[float, ...]


class SiteEvaluation(Message):
    """One hospital's evaluation of given weights on its held-out patients.

    `intervals` are 95 % percentile bootstrap intervals over the patients; None where the figures are suppressed.
    `patients`, every figure of each patient without an identifier, and `calibration`, per class, are of data that may
    be shown, at the last evaluation of a run.
    """

    hospital: str
    round: int
    metrics: dict[str, Metric]
    patient_scores: tuple[float, ...] | None = None
    pictures: tuple[bytes, ...] = ()
    intervals: dict[str, tuple[float, float]] | None = None
    patients: tuple[dict[str, float], ...] | None = None
    calibration: dict[str, ReliabilityBins] | None = None


class Receipt(Message):
    """The record of one round: who was asked, who trained, who did not and why.

    With a secret cohort nothing here says who was asked: amplification by sampling is claimed, and so asked, trained
    and update_hashes are empty and of failures only those are named that do not depend on the draw. `reason` says why
    nothing was published; empty where something was. `late` are hospitals whose update of an earlier round, named,
    missed its deadline and was counted in this one. `budget_hash` is that of config/site.py. `attackers` says who
    attacks and how in a study of attacks; such weights are of no other use.
    """

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
    secret_cohort: bool = False
    reason: str = ""
    late: dict[str, int] = Field(default_factory=dict)
    budget_hash: str = ""
    attackers: str = ""


class SignedReceipt(Receipt):
    """A receipt in its chain: `previous` is the hash of the one before, see medfl_ray/store/run/receipts.py.

    All three are empty in a receipt of a version that did not sign.
    """

    previous: str = ""
    public_key: str = ""
    signature: str = ""


class RoundResult(Message):
    """A closed round as the run's loop, the display and the report see it."""

    round: int
    receipt: Receipt
    metrics: dict[str, dict[str, Metric]]
    duration_s: float

    @property
    def lacks_scores(self) -> bool:
        """Whether a hospital that was asked to score the weights did not: the mean is then of other hospitals."""
        return any(failure.stage == "evaluate" for failure in self.receipt.failures)

    @property
    def score(self) -> float | None:
        """Mean over the hospitals of Dice, or of AUC, where every one that was evaluated may show its own; else None.

        A mean over some of them would be of other hospitals than the one of the round before.
        """
        return mean_over_hospitals(self.metrics)


def mean_over_hospitals(metrics: Mapping[str, Mapping[str, Metric]]) -> float | None:
    """Return the mean over hospitals of the headline metric; None where one is suppressed or there is none."""
    tables = [table for table in metrics.values() if any(name in table for name in HEADLINES)]
    for name in HEADLINES:
        values = [table[name].value for table in tables if name in table]
        if values:
            known = [value for value in values if value is not None and math.isfinite(value)]
            return sum(known) / len(known) if len(known) == len(values) else None
    return None
