"""What a coordinator and a hospital say to each other over Flower: JSON and one float32 vector, never a pickle.

This file imports no Flower. A request is fields and perhaps the round's weights; an answer is fields, perhaps a
vector (an update, or a baseline's weights) and perhaps pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from medfl_ray.errors import FederationError
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.messages import (
    ClientFailure,
    ClientUpdate,
    HospitalInfo,
    Message,
    Metric,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
)
from medfl_ray.params import Vector

Ask = Literal["who", "describe", "reserve", "release", "train", "evaluate", "alone", "ledger"]


class HospitalRequest(Message):
    """What a coordinator asks of one hospital.

    `index` is the hospital's place in the run, which its random numbers depend on. `config_hash` names the run: a
    hospital with another one answers nothing else. `expected_heads` are rows that its ledger must hold.
    """

    ask: Ask
    hospital: str = ""
    index: int = 0
    job: str = ""
    config_hash: str = ""
    expected_heads: tuple[str, ...] = ()
    plan: RoundPlan | None = None
    plans: tuple[RoundPlan, ...] = ()
    returns_weights: bool = False
    round: int = 0
    pictures: bool = False
    reason: str = ""

    @property
    def alone_plan(self) -> AlonePlan:
        """The baseline that is asked for."""
        return AlonePlan(self.plans, self.returns_weights)


class UpdateFields(Message):
    """A ClientUpdate but its vector."""

    hospital: str
    round: int
    attempt: int
    layout_checksum: str
    aggregation_weight: int
    num_steps: int
    spent: PrivacySpent | None
    metrics: dict[str, Metric]
    duration: Metric | None
    within_clip: bool | None
    signature: str


class AloneFields(Message):
    """An AloneResult but its vector."""

    hospital: str
    metrics: dict[str, Metric]
    spent: PrivacySpent | None
    patient_scores: tuple[float, ...] | None = None
    curve: dict[int, dict[str, Metric]] = Field(default_factory=dict)


class Identity(Message):
    """Which hospital a node is."""

    hospital: str


@dataclass(frozen=True, eq=False)
class WireMessage:
    """An answer as it travels: its kind, its fields as JSON, a vector and pictures."""

    kind: str
    body: str
    vector: Vector | None = None
    pictures: tuple[bytes, ...] = ()


HospitalReply = (
    HospitalInfo
    | ClientFailure
    | PrivacySpent
    | ClientUpdate
    | SiteEvaluation
    | AloneResult
    | Identity
    | dict[str, Any]
    | None
)
PLAIN: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (HospitalInfo, ClientFailure, PrivacySpent, SiteEvaluation, Identity)
}


def text_of(message: Message, **options: Any) -> str:
    """Return a message as JSON that keeps NaN, which a metric of a hospital without such patients is."""
    return json.dumps(message.model_dump(**options))


def pack(answer: HospitalReply) -> WireMessage:
    """Return an answer as it travels."""
    if isinstance(answer, ClientUpdate):
        return WireMessage("ClientUpdate", text_of(_fields(UpdateFields, answer)), answer.delta)
    if isinstance(answer, AloneResult):
        return WireMessage("AloneResult", text_of(_fields(AloneFields, answer)), answer.weights)
    if isinstance(answer, SiteEvaluation):
        return WireMessage("SiteEvaluation", text_of(answer, exclude={"pictures"}), None, answer.pictures)
    if isinstance(answer, Message):
        return WireMessage(type(answer).__name__, text_of(answer))
    return WireMessage("none" if answer is None else "ledger", json.dumps(answer))


def unpack(parcel: WireMessage) -> HospitalReply:
    """Return what travelled.

    Raises:
      FederationError: the parcel is not one that `pack` makes.
    """
    try:
        body = json.loads(parcel.body)
        if parcel.kind == "ClientUpdate":
            if parcel.vector is None:
                raise FederationError("an update without its vector arrived")
            return ClientUpdate(delta=parcel.vector, **_attributes(UpdateFields.model_validate(body)))
        if parcel.kind == "AloneResult":
            return AloneResult(weights=parcel.vector, **_attributes(AloneFields.model_validate(body)))
        if parcel.kind == "SiteEvaluation":
            return SiteEvaluation.model_validate({**body, "pictures": parcel.pictures})
        if parcel.kind in PLAIN:
            found: Any = PLAIN[parcel.kind].model_validate(body)
            return found  # type: ignore[no-any-return]
        if parcel.kind == "ledger" and isinstance(body, dict):
            return body
        if parcel.kind == "none" and body is None:
            return None
    except (ValueError, TypeError, RecursionError, ValidationError) as error:
        raise FederationError(f"an answer arrived that cannot be read ({type(error).__name__})") from None
    raise FederationError("an answer of an unknown kind arrived; install the same version of medfl-ray on both sides")


def _fields(kind: Any, whole: object) -> Message:
    fields: Message = kind(**{name: getattr(whole, name) for name in kind.model_fields})
    return fields


def _attributes(fields: Message) -> Mapping[str, Any]:
    return {name: getattr(fields, name) for name in type(fields).model_fields}
