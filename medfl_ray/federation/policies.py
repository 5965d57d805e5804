"""What to do with a round as it stands: pure decisions, tested without hospitals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from medfl_ray.config.federation import FederationConfig
from medfl_ray.messages import ClientFailure, Receipt, RoundPlan

Verdict = Literal["publish", "skip", "stop"]
BLAMED = ("start", "reserve", "train", "late", "screen")
LONGEST_EXCLUSION = 16
FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class RoundDecision:
    """A verdict on a round and the sentence that explains it."""

    verdict: Verdict
    reason: str


def judge_round(
    config: FederationConfig, num_updates: int, num_asked: int, failed_rounds_before: int, problem: str | None = None
) -> RoundDecision:
    """Decide whether a round is published, skipped (weights stay) or the last one of the run.

    `problem` says why the updates, enough or not, cannot be combined.
    """
    delivered = f"{num_updates} of {num_asked} hospitals delivered an update"
    if num_updates >= config.min_clients and problem is None:
        return RoundDecision("publish", delivered)
    below = num_updates < config.min_clients
    missing = f"{delivered}; min_clients is {config.min_clients}" if below else f"{delivered}; {problem}"
    if failed_rounds_before >= config.max_failed_rounds:
        return RoundDecision("stop", f"{missing}, and the {failed_rounds_before} rounds before failed too")
    return RoundDecision("skip", f"{missing}; the weights stay as they were")


@dataclass(frozen=True)
class StartDecision:
    """Whether a run may begin, and the sentence that explains it."""

    may_start: bool
    reason: str


def can_start(config: FederationConfig, num_available: int) -> StartDecision:
    """Decide whether enough hospitals are present to begin."""
    needed = max(config.min_available_clients, config.min_clients)
    if num_available >= needed:
        return StartDecision(True, f"{num_available} hospitals are present")
    return StartDecision(
        False, f"{num_available} hospitals are present; federation.min_available_clients asks for {needed}"
    )


@dataclass(frozen=True)
class Standing:
    """What a hospital's last rounds say of it: failures in a row, the last reason, and rounds it has sat out since."""

    failures: int = 0
    reason: str = ""
    sat_out: int = 0


def after_round(standing: Standing, hospital: str, receipt: Receipt) -> Standing:
    """Return a hospital's standing after one more round; an interrupted round says nothing about hospitals."""
    if hospital in receipt.trained or hospital in receipt.late:
        return Standing()
    own = [failure for failure in receipt.failures if failure.hospital == hospital]
    blamed = next((failure for failure in own if failure.stage in BLAMED), None)
    if blamed is not None:
        return Standing(standing.failures + 1, blamed.reason)
    if any(failure.stage == "select" for failure in own):
        return Standing(standing.failures, standing.reason, standing.sat_out + 1)
    return standing


def why_left_out(standing: Standing, max_failures: int) -> str | None:
    """Return why a hospital is not asked, or None: after max_failures in a row it sits out 1, 2, 4, ... 16 rounds.

    After each such pause it is asked once, and an update that arrives sets it back to none.
    """
    if standing.failures < max_failures:
        return None
    pause = min(LONGEST_EXCLUSION, 2 ** min(standing.failures - max_failures, 10))
    if standing.sat_out >= pause:
        return None
    left = pause - standing.sat_out
    return (
        f"left out for {left} more {'round' if left == 1 else 'rounds'} after {standing.failures} failures in a row; "
        f"the last: {standing.reason}"
    )


class FailureHistory:
    """Who failed how often in a row, from the receipts of a run: a resumed run knows it too. It never changes."""

    def __init__(self, receipts: Iterable[Receipt] = (), before: FailureHistory | None = None) -> None:
        """Take the receipts of rounds in order, behind those of a history before them."""
        standings = dict(before._standings) if before is not None else {}
        for receipt in receipts:
            for hospital in {*receipt.asked, *receipt.late, *(failure.hospital for failure in receipt.failures)}:
                standings[hospital] = after_round(standings.get(hospital, Standing()), hospital, receipt)
        self._standings: Mapping[str, Standing] = standings

    def after(self, receipt: Receipt) -> FailureHistory:
        """Return the history with one more round."""
        return FailureHistory([receipt], self)

    def left_out(self, hospitals: Iterable[str], config: FederationConfig) -> dict[str, str]:
        """Return the hospitals that sit out the next round, and why; nobody does where too few would remain."""
        names = list(hospitals)
        reasons = {
            name: why_left_out(self._standings.get(name, Standing()), config.max_hospital_failures) for name in names
        }
        out = {name: reason for name, reason in reasons.items() if reason is not None}
        return out if len(names) - len(out) >= config.min_clients else {}


@dataclass(frozen=True)
class RunHistory:
    """What earlier rounds leave to the next: who failed, whose update may come late, and rounds without a result.

    `late_plans` are the plans of updates that missed the last round's deadline; `failed_before` counts the rounds in a
    row that were not published.
    """

    failure_history: FailureHistory = field(default_factory=FailureHistory)
    late_plans: Mapping[str, RoundPlan] = field(default_factory=dict)
    failed_before: int = 0

    def after(self, plan: RoundPlan, receipt: Receipt) -> RunHistory:
        """Return the history with one more closed round."""
        late = [f.hospital for f in receipt.failures if f.stage == "late" and f.round == plan.round]
        return RunHistory(
            self.failure_history.after(receipt),
            dict.fromkeys(late, plan),
            0 if receipt.published else self.failed_before + 1,
        )


def hospitals_to_retry(failures: Iterable[ClientFailure], may_train_again: Iterable[str] = ()) -> list[str]:
    """Return whom to ask again within the round: the fault may pass, and asking again is no second release.

    Args:
      may_train_again: hospitals without differential privacy, whose training may be repeated.
    """
    harmless = set(may_train_again)
    return [f.hospital for f in failures if f.transient and (not f.may_have_left or f.hospital in harmless)]


def pause_before(retry: int) -> float:
    """Return the seconds to wait before the first, second, ... time that hospitals are asked again."""
    return float(FIRST_PAUSE_S * 2 ** (retry - 1))
