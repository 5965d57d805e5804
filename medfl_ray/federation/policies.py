"""What to do with a round as it stands: pure decisions, tested without hospitals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medfl_ray.config import FederationConfig

Verdict = Literal["publish", "skip", "stop"]


@dataclass(frozen=True)
class Decision:
    """A verdict on a round and the sentence that explains it."""

    verdict: Verdict
    reason: str


def judge_round(config: FederationConfig, num_updates: int, num_asked: int, failed_rounds_before: int) -> Decision:
    """Decide whether a round is published, skipped (weights stay) or the last one of the run."""
    if num_updates >= config.min_clients:
        return Decision("publish", f"{num_updates} of {num_asked} hospitals delivered an update")
    missing = f"{num_updates} of {num_asked} hospitals delivered an update; min_clients is {config.min_clients}"
    if failed_rounds_before >= config.max_failed_rounds:
        return Decision("stop", f"{missing}, and the {failed_rounds_before} rounds before failed too")
    return Decision("skip", f"{missing}; the weights stay as they were")


def can_start(config: FederationConfig, num_available: int) -> Decision:
    """Decide whether enough hospitals are present to begin."""
    needed = max(config.min_available_clients, config.min_clients)
    if num_available >= needed:
        return Decision("publish", f"{num_available} hospitals are present")
    return Decision(
        "stop", f"{num_available} hospitals are present; federation.min_available_clients asks for {needed}"
    )
