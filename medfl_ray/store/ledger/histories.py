"""Comparing two histories of one account: what a later one leaves out, and whether one is the other's beginning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from medfl_ray.store.ledger.events import (
    CHARGE_FIELDS,
    LedgerEvent,
    charges,
    reservation_states,
    unprotected_jobs,
)

Charged = Counter[tuple[object, ...]]


def left_out(earlier: Sequence[LedgerEvent], later: Sequence[LedgerEvent]) -> str | None:
    """Say what a history that replaces another fails to carry over; None where it carries over everything.

    Every charge of the earlier one must be in the later one as often. A charge that was used up, or charged again by a
    recovery, must not stand in the later one as a reservation that could still be given back.
    """
    for rows_kept, words in ((_charged, "charge"), (_final, "used or recovered charge")):
        missing = rows_kept(earlier) - rows_kept(later)
        if missing:
            job, number, attempt = next(iter(missing))[:3]
            return (
                f"{missing.total()} {words}(s) of {rows_kept(earlier).total()} are missing, the first of job {job!r}, "
                f"round {number}, attempt {attempt}"
            )
    jobs = set(unprotected_jobs(earlier)) - set(unprotected_jobs(later))
    if jobs:
        return f"it does not say that job {min(jobs)!r} used the data without protection, which made epsilon infinite"
    return None


def is_beginning(rows: Sequence[LedgerEvent], of: Sequence[LedgerEvent]) -> bool:
    """Say whether a history is the beginning of another, or all of it; contents are compared, and not only hashes."""
    return len(rows) <= len(of) and all(one == other for one, other in zip(rows, of, strict=False))


def _charged(events: Sequence[LedgerEvent]) -> Charged:
    return Counter(_content(event) for event in charges(events))


def _final(events: Sequence[LedgerEvent]) -> Charged:
    states = reservation_states(events)
    final = (event for event in charges(events) if states.get(event.reservation or "") != "reserved")
    return Counter(_content(event) for event in final)


def _content(event: LedgerEvent) -> tuple[object, ...]:
    return tuple(getattr(event, name) for name in CHARGE_FIELDS)
