"""When a run may end before its last round, and which round was the best; pure functions of the closed rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medfl_ray.config.run import RunConfig
from medfl_ray.messages import RoundResult
from medfl_ray.study_records import StoppingRecord

Scores = list[tuple[int, float]]


def scores_of(results: Iterable[RoundResult], last: int) -> Scores:
    """Return (round, mean score over hospitals) of the published rounds up to `last` that may show one, in order."""
    found = {
        result.round: result.score
        for result in results
        if result.receipt.published and result.round <= last and not result.lacks_scores
    }
    return [(number, score) for number, score in sorted(found.items()) if score is not None]


def best_of(scores: Sequence[tuple[int, float]], min_improvement: float = 0.0) -> tuple[int, float] | None:
    """Return the first round that none after it exceeds by more than `min_improvement`; None without scores."""
    best: tuple[int, float] | None = None
    for number, score in scores:
        if best is None or score > best[1] + min_improvement:
            best = number, score
    return best


def why_stop(run: RunConfig, results: Iterable[RoundResult], last: int) -> str:
    """Return in one sentence why the run ends after round `last`, empty where it goes on."""
    patience = run.federation.patience
    if patience is None or last >= run.federation.rounds:
        return ""
    scores = scores_of(results, last)
    best = best_of(scores, run.federation.min_improvement)
    if best is None:
        return ""
    since = sum(number > best[0] for number, _ in scores)
    if since < patience:
        return ""
    return (
        f"ended early after round {last} of {run.federation.rounds}: no better mean score than {best[1]:.4f} of round "
        f"{best[0]} in {since} evaluation{'s' if since > 1 else ''} (federation.patience)"
    )


def stopping_record(run: RunConfig, results: Sequence[RoundResult], last: int, kept: int) -> StoppingRecord:
    """Return what is written of the run's end; `kept` is the round whose weights are exported."""
    best = best_of(scores_of(results, last))
    reason = why_stop(run, results, last)
    return StoppingRecord(
        best_round=best[0] if best else None,
        best_score=best[1] if best else None,
        last_round=last,
        kept_round=kept,
        stopped_early=bool(reason),
        reason=reason,
    )
