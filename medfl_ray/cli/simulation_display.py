"""The view of a simulation: one line per round with hospitals per second, and where the time went as a stacked bar."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.text import Text

from medfl_ray.federation.events import Event, HospitalState, Notice, PhaseStarted, RoundClosed, RoundTimed
from medfl_ray.messages import RoundResult
from medfl_ray.privacy.account import epsilon_words

PARTS = {"train": "green", "data": "blue", "wait": "red", "aggregate": "yellow", "evaluate": "magenta"}
MARKS = {"train": "█", "data": "▓", "wait": "░", "aggregate": "▒", "evaluate": "■"}
BAR_WIDTH = 40
SHOWN_FAILURES = 3


class SimulationDisplay:
    """Shows a simulation's events as plain lines, on a terminal and in a log alike; a context manager."""

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._num_rounds = num_rounds
        self._timed: list[RoundTimed] = []
        self._score = ""
        self._failures: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._timed:
            self._summarise()

    def update(self, event: Event) -> None:
        """Take one event."""
        match event:
            case PhaseStarted(name="start"):
                self._say("starting the processes of the virtual hospitals")
            case PhaseStarted(name="federated"):
                self._say(f"{'round':>9}  {'hospitals':>9}  {'seconds':>8}  {'per second':>10}  {_legend()}")
            case PhaseStarted(name="evaluate"):
                self._say("last evaluation")
            case HospitalState(state="failed", hospital=hospital, detail=detail):
                self._failures.append(f"{hospital}: {detail}")
            case RoundClosed(result=result):
                self._close(result)
            case RoundTimed():
                self._timed.append(event)
                self._say(self._line(event))
            case Notice(message=message):
                self._say(message)

    def _line(self, timed: RoundTimed) -> Text:
        rate = timed.num_hospitals / timed.duration_s if timed.duration_s else 0.0
        figures = f"{timed.num_hospitals:>9}  {timed.duration_s:>8.2f}  {rate:>10.1f}"
        line = Text(f"{timed.round:>4}/{self._num_rounds:<4}  {figures}  ")
        return line.append_text(stacked_bar(timed.seconds)).append(self._score)

    def _close(self, result: RoundResult) -> None:
        """Remember a round's mean score, and say at once what went wrong in it."""
        values = [metrics["dice"].value for metrics in result.metrics.values() if "dice" in metrics]
        known = [value for value in values if value is not None]
        self._score = f"  Dice {sum(known) / len(known):.3f} (mean of {len(known)})" if known else ""
        one = max(result.receipt.spent.values(), key=lambda spent: spent.epsilon, default=None)
        if one is not None:
            terms = f"{one.unit}-level, delta={one.delta:g}, {one.adjacency.replace('_', '/')}"
            most = "" if one.is_unprotected else "up to "
            self._score += f"  epsilon so far {most}{epsilon_words(one.epsilon)} ({terms})"
        for failure in self._failures[:SHOWN_FAILURES]:
            self._say(f"  failed: {failure}")
        if len(self._failures) > SHOWN_FAILURES:
            self._say(f"  and {len(self._failures) - SHOWN_FAILURES} more, in receipts.jsonl")
        self._failures.clear()

    def _summarise(self) -> None:
        """Print the median round, the first one left out where there are others: it also loads data and libraries."""
        rounds = self._timed[1:] or self._timed
        duration = median(timed.duration_s for timed in rounds)
        rates = [timed.num_hospitals / timed.duration_s for timed in rounds if timed.duration_s]
        seconds = {name: median(timed.seconds.get(name, 0.0) for timed in rounds) for name in PARTS}
        whole = sum(seconds.values()) or 1.0
        rate = f"{median(rates):.1f} hospitals/s" if rates else ""
        self._say(f"\nmedian of {len(rounds)} round{'s' if len(rounds) > 1 else ''}: {duration:.2f} s, {rate}")
        self._console.print(stacked_bar(seconds))
        for name, value in seconds.items():
            self._console.print(Text(f"  {MARKS[name]} {name:<10} {value:8.3f} s  {100 * value / whole:5.1f} %"))

    def _say(self, line: str | Text) -> None:
        self._console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)


def stacked_bar(seconds: Mapping[str, float], width: int = BAR_WIDTH) -> Text:
    """Return a bar of `width` characters, divided as the seconds are."""
    whole = sum(seconds.get(name, 0.0) for name in PARTS)
    bar, drawn, reached = Text(), 0, 0.0
    for name, colour in PARTS.items():
        reached += seconds.get(name, 0.0)
        end = round(width * reached / whole) if whole else 0
        bar.append(MARKS[name] * (end - drawn), style=colour)
        drawn = end
    return bar.append(" " * (width - drawn))


def _legend() -> str:
    return "  ".join(f"{MARKS[name]} {name}" for name in PARTS)
