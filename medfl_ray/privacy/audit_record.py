"""What an audit leaves in a run's folder, audit.json, and what the report reads from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

AUDIT_FILE = "audit.json"


class Record(BaseModel):
    """A frozen part of audit.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AuditedEpsilon(Record):
    """At one delta: what is claimed, what was refuted up to, and the most that flawless guesses could refute."""

    delta: float
    claimed: float
    lower_bound: float
    ceiling: float
    num_guessed: int
    num_correct: int

    @property
    def is_exceeded(self) -> bool:
        """Whether the claim is refuted."""
        return self.lower_bound > self.claimed


class MechanismAudit(Record):
    """Canaries through the private steps of one hospital's mechanism.

    hospitals: all whose mechanism it is. at: the claim's own delta first. gaussian_estimate: what the sum of all
    steps gives away by the Gaussian-canary estimate, an estimate without confidence; None where it is not finite.
    """

    hospitals: tuple[str, ...]
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add_remove"] = "add_remove"
    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    num_steps: int
    num_canaries: int
    confidence: float
    at: tuple[AuditedEpsilon, ...]
    gaussian_estimate: float | None

    @property
    def is_exceeded(self) -> bool:
        """Whether a claim is refuted at any delta."""
        return any(epsilon.is_exceeded for epsilon in self.at)

    @property
    def headline(self) -> AuditedEpsilon:
        """What is shown next to the claim: its own delta, or the one at which it was refuted."""
        return next((epsilon for epsilon in self.at if epsilon.is_exceeded), self.at[0])

    @property
    def could_exceed(self) -> bool:
        """Whether flawless guesses on these canaries would have refuted the claim."""
        return any(epsilon.ceiling > epsilon.claimed for epsilon in self.at)


class MembershipAttack(Record):
    """How well the final model's loss tells patients it trained on from held-out ones; 0.5 is not at all."""

    auc: float
    low: float
    high: float
    confidence: float
    num_members: int
    num_others: int
    label: Literal["public"] = "public"


class AuditRecord(Record):
    """audit.json. A part that was not done is None, and its note says why."""

    rounds: int
    mechanism: MechanismAudit | None
    mechanism_note: str = ""
    membership: MembershipAttack | None
    membership_note: str = ""
