"""What a run says while it goes on: small frozen messages for the display, the log and the API."""

from __future__ import annotations

from typing import Literal

from medfl_ray.messages import Message, RoundResult


class PhaseStarted(Message):
    """The run entered a phase; `total_rounds` is its length where it has one."""

    type: Literal["phase"] = "phase"
    name: Literal["start", "federated", "evaluate", "baselines", "export", "report"]
    total_rounds: int = 0


class HospitalState(Message):
    """A hospital changed its state within the current round."""

    type: Literal["hospital"] = "hospital"
    hospital: str
    state: Literal["waiting", "reserving", "training", "done", "failed", "left_out"]
    detail: str = ""
    step: int = 0
    num_steps: int = 0


class RoundClosed(Message):
    """A round ended, published or not."""

    type: Literal["round"] = "round"
    result: RoundResult


class BaselineProgress(Message):
    """A baseline ended at a hospital; `done` of `total` are finished."""

    type: Literal["baseline"] = "baseline"
    baseline: str
    done: int
    total: int


class RunEnded(Message):
    """The run is about to end, or has something to say to everybody."""

    type: Literal["end"] = "end"
    message: str


Event = PhaseStarted | HospitalState | RoundClosed | BaselineProgress | RunEnded
