"""What happens in a run, as it happens: the events that a display, a log or a stream of the API follows.

An event is a frozen message with a `type`, picklable and JSON-able, so that it crosses processes and
sockets unchanged. It holds no more than a receipt does: no image, no identifier, no suppressed figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from medfl_ray.messages import Message, Metric, PrivacySpent, RoundResult

State = Literal["waiting", "reserving", "training", "done", "failed", "left_out"]


class PhaseStarted(Message):
    """A part of the run begins; `total_rounds` is how many rounds (or baselines) it has, where that is known.

    The federated rounds are the phase named "federated".
    """

    type: Literal["phase"] = "phase"
    name: str
    total_rounds: int | None = None


class HospitalState(Message):
    """What one hospital is doing; `detail` is the reason where it failed or was left out.

    Of an update that is in, `update_bytes` is its size and `duration` the hospital's own time for it.
    """

    type: Literal["hospital"] = "hospital"
    hospital: str
    state: State
    detail: str = ""
    step: int | None = None
    num_steps: int | None = None
    spent: PrivacySpent | None = None
    update_bytes: int | None = None
    duration: Metric | None = None


class RoundClosed(Message):
    """A round has ended, published or not."""

    type: Literal["round"] = "round"
    result: RoundResult


class RoundTimed(Message):
    """Where the time of a simulated round went: seconds by name, of which `wait` is processes with nothing to do.

    There is none for a round whose cohort is secret, since a larger cohort takes longer.
    """

    type: Literal["timing"] = "timing"
    round: int
    num_hospitals: int
    duration_s: float
    seconds: dict[str, float]


class AccountsClosed(Message):
    """Everything of the run is charged, baselines and studies included; what each account holds now."""

    type: Literal["accounts"] = "accounts"
    spent: dict[str, PrivacySpent]


class BaselineProgress(Message):
    """One more baseline is done: a hospital's name, or "central"."""

    type: Literal["baseline"] = "baseline"
    baseline: str
    done: int
    total: int


class Notice(Message):
    """A sentence for the user that is no change of state, such as an address or "stopping after this round"."""

    type: Literal["notice"] = "notice"
    message: str


class RunEnded(Message):
    """The run is over; the message says how it ended and what can be done next."""

    type: Literal["end"] = "end"
    message: str


Event = PhaseStarted | HospitalState | RoundClosed | RoundTimed | AccountsClosed | BaselineProgress | Notice | RunEnded
_ANY_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(raw: Mapping[str, Any]) -> Event:
    """Turn `event.model_dump()`, or the same read from JSON, back into an event."""
    return _ANY_EVENT.validate_python(raw)
