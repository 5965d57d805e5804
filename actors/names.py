"""What a run's actors are called, so that Ray's dashboard lists them together and says which hospital is where."""

from __future__ import annotations

from collections.abc import Sequence


def actor_name(run: str, role: str, which: str = "") -> str:
    """Return the name of one actor of a run, as in medfl:lungs-20250102-030405:hospital:site-a."""
    return ":".join(part for part in ("medfl", run, role, which) if part)


def group_name(hospitals: Sequence[str]) -> str:
    """Return a short name of the hospitals that share an actor."""
    return "+".join(hospitals) if len(hospitals) <= 2 else f"{hospitals[0]}+{len(hospitals) - 1}"
