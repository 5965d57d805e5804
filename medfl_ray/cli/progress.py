"""The live view of a run: rounds, each hospital's state, score, epsilon against budget and the time left.

On a terminal it is one table that is redrawn in place. Elsewhere (a log, a pipe, CI) it is plain lines, one
per round and one per phase.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medfl_ray.config.run import RunConfig
from medfl_ray.federation.events import (
    BaselineProgress,
    Event,
    HospitalState,
    Notice,
    PhaseStarted,
    RoundClosed,
    RunEnded,
    parse_event,
)
from medfl_ray.messages import HEADLINES, ClientFailure, Metric, PrivacySpent, RoundResult
from medfl_ray.privacy.account import epsilon_words

STYLES = {
    "waiting": ("·", "dim"),
    "reserving": ("…", "yellow"),
    "training": ("▶", "cyan"),
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
    "left_out": ("–", "yellow"),
}
PHASES = {"start": "starting hospitals", "federated": "federated rounds", "evaluate": "last evaluation"}
NARROW, TINY = 84, 48


@dataclass
class HospitalRow:
    """What the view knows of one hospital."""

    state: str = "waiting"
    detail: str = ""
    step: int | None = None
    num_steps: int | None = None
    score: Metric | None = None
    spent: PrivacySpent | None = None


class RunDisplay:
    """Shows a run's events; a context manager that leaves the last view on the screen."""

    def __init__(
        self, run: RunConfig, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run = run
        self._console = console or Console()
        self._clock = clock
        self._started = clock()
        self._phase = PHASES["start"]
        self._total, self._done = run.federation.rounds, 0
        self._durations: list[float] = []
        self._baselines: tuple[int, int] | None = None
        self._metric = "dice" if run.data.task == "segmentation" else "auc"
        self._rows: dict[str, HospitalRow] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, event: Event | Mapping[str, Any]) -> None:
        """Take one event, as an object or as the plain mapping that crossed a process or socket."""
        match parse_event(event) if isinstance(event, Mapping) else event:
            case PhaseStarted() as phase:
                self._start_phase(phase)
            case HospitalState() as state:
                self._set_state(state)
            case RoundClosed(result=result):
                self._close_round(result)
            case BaselineProgress() as progress:
                self._baselines = (progress.done, progress.total)
                self._say_plainly(f"baseline {progress.done} of {progress.total}: {progress.baseline} is done")
            case Notice(message=message) | RunEnded(message=message):
                self._console.print(Text(message), soft_wrap=True)

    def _start_phase(self, phase: PhaseStarted) -> None:
        self._phase = PHASES.get(phase.name, phase.name)
        if phase.name in ("start", "federated") and phase.total_rounds:
            self._total = phase.total_rounds
        size = f", {phase.total_rounds} in all" if phase.total_rounds and phase.name != "start" else ""
        self._say_plainly(f"{self._run.name}: {self._phase}{size}")

    def _set_state(self, event: HospitalState) -> None:
        row = self._rows.setdefault(event.hospital, HospitalRow())
        row.state, row.detail, row.step, row.num_steps = event.state, event.detail, event.step, event.num_steps
        row.spent = event.spent or row.spent
        # Within rounds the round's own line names the failures: one line per round, however many fail.
        if event.state == "failed" and self._phase == PHASES["start"]:
            self._say_plainly(f"{event.hospital} cannot take part: {event.detail}")

    def _close_round(self, result: RoundResult) -> None:
        self._done = max(self._done, result.round) if result.receipt.published else self._done
        self._durations.append(result.duration_s)
        for hospital, metrics in result.metrics.items():
            row = self._rows.setdefault(hospital, HospitalRow())
            name = next((name for name in HEADLINES if name in metrics), None)
            if name is not None:
                self._metric, row.score = name, metrics[name]
        for hospital, spent in result.receipt.spent.items():
            self._rows.setdefault(hospital, HospitalRow()).spent = spent
        for failure in result.receipt.failures:
            row = self._rows.setdefault(failure.hospital, HospitalRow())
            row.state, row.detail = ("left_out" if failure.stage == "reserve" else "failed"), failure.reason
        self._say_plainly(round_line(result, self._total, self._metric, self._time_left(), self._run))

    def _say_plainly(self, line: str) -> None:
        if self._live is None:
            self._console.print(Text(line), soft_wrap=True)

    def _time_left(self) -> float | None:
        """Seconds that the remaining rounds will take at the pace of the last ones; None before the first."""
        # The first round also reads the images; it would make every estimate too long.
        recent = (self._durations[1:] or self._durations)[-5:]
        return None if not recent else (self._total - self._done) * sum(recent) / len(recent)

    def render(self) -> RenderableType:
        """Return the view at this moment, fit for the console's width and height."""
        width = self._console.width
        parts: list[RenderableType] = [self._heading(width), self._table(width)]
        terms = self._epsilon_terms()
        if terms and width >= TINY:
            parts.append(Text(terms, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def _heading(self, width: int) -> RenderableType:
        done, total = self._baselines or (self._done, self._total)
        what = "baselines" if self._baselines else "round"
        words = Text(f"{self._run.name}  {self._phase}  {what} {done} of {total}", style="bold")
        words.no_wrap, words.overflow = True, "ellipsis"
        if width < TINY:
            return words
        left = None if self._baselines else self._time_left()
        times = f"{clock_words(self._clock() - self._started)} elapsed"
        times += f", about {clock_words(left)} left" if left is not None and left > 0 else ""
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(justify="right", no_wrap=True, overflow="ellipsis")
        grid.add_row(ProgressBar(total=max(1, total), completed=done), Text(times, style="dim"))
        return Group(words, grid)

    def _table(self, width: int) -> Table:
        table = Table(box=None, expand=width >= NARROW, padding=(0, 1), header_style="dim", pad_edge=False)
        table.add_column("hospital", no_wrap=True, overflow="ellipsis", min_width=6)
        table.add_column("state", no_wrap=True, overflow="ellipsis", min_width=6)
        if width >= TINY:
            table.add_column(metric_title(self._metric), no_wrap=True, justify="right")
            if self._run.privacy.enable_dp:
                table.add_column("epsilon so far", no_wrap=True, overflow="ellipsis", justify="right")
        if width >= NARROW:
            table.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
        for cells in self._lines(width):
            table.add_row(*cells[: len(table.columns)])
        return table

    def _lines(self, width: int) -> list[list[Text]]:
        room = max(3, self._console.height - 6)
        names = sorted(self._rows)
        # Where not all fit, what needs a look comes first.
        if len(names) > room:
            rank = {"failed": 0, "left_out": 1, "training": 2, "reserving": 3}
            names = sorted(names, key=lambda name: (rank.get(self._rows[name].state, 4), name))
        lines = [self._cells(name, self._rows[name], width) for name in names[:room]]
        if len(names) > room:
            lines.append([Text(f"and {len(names) - room} more", style="dim")])
        return lines

    def _cells(self, name: str, row: HospitalRow, width: int) -> list[Text]:
        mark, style = STYLES[row.state]
        state = Text(f"{mark} {row.state.replace('_', ' ')}", style=style)
        if row.state == "training" and row.num_steps:
            state.append(f" {row.step}/{row.num_steps}" if row.step is not None else f" {row.num_steps} steps")
        cells = [Text(name), state]
        if width >= TINY:
            cells.append(
                Text(metric_words(row.score), style="" if row.score and row.score.value is not None else "dim")
            )
            if self._run.privacy.enable_dp:
                cells.append(Text(spent_words(row.spent)))
        return [*cells, Text(row.detail, style=style)]

    def _epsilon_terms(self) -> str:
        if not self._run.privacy.enable_dp:
            return "differential privacy is off"
        spent = [row.spent for row in self._rows.values() if row.spent]
        return f"epsilon so far of each account: ({terms_words(spent)}; {budget_words(spent, self._run)})"


def round_line(result: RoundResult, total: int, metric: str, left_s: float | None, run: RunConfig) -> str:
    """Return a closed round as one line: who trained, the score, the cost so far, the time, and who failed why."""
    receipt = result.receipt
    parts = [f"round {result.round}/{total}", f"{len(receipt.trained)} of {len(receipt.asked)} hospitals trained"]
    if not receipt.published:
        parts.append("NOT PUBLISHED")
    found = [metrics[metric] for metrics in result.metrics.values() if metric in metrics]
    values = [m.value for m in found if m.value is not None]
    if values:
        parts.append(f"{metric_title(metric)} {math.fsum(values) / len(values):.3f} (mean of {len(values)})")
    elif found:
        parts.append(f"{metric_title(metric)} suppressed")
    if receipt.spent:
        spent = list(receipt.spent.values())
        worst = max(spent, key=lambda spent: spent.epsilon)
        terms = f"{terms_words(spent)}; {budget_words([worst], run)}"
        most = "" if worst.is_unprotected else "at most "
        parts.append(f"epsilon so far {most}{epsilon_words(worst.epsilon)} ({terms})")
    parts.append(f"{result.duration_s:.0f} s")
    if left_s:
        parts.append(f"about {clock_words(left_s)} left")
    parts.extend(_failure_words(failure) for failure in receipt.failures[:3])
    if len(receipt.failures) > 3:
        parts.append(f"and {len(receipt.failures) - 3} more failures")
    return "; ".join(parts)


def _failure_words(failure: ClientFailure) -> str:
    verb = "left out" if failure.stage == "reserve" else "failed"
    return f"{failure.hospital} {verb}: {' '.join(failure.reason.split())}"


def metric_title(metric: str) -> str:
    """Return a metric's name as it is written."""
    return {"dice": "Dice", "auc": "AUC"}.get(metric, metric)


def metric_words(metric: Metric | None) -> str:
    """Return a score, or that it is suppressed, or a dash where none was measured yet."""
    if metric is None:
        return "–"
    return "suppressed" if metric.value is None else f"{metric.value:.3f}"


def spent_words(spent: PrivacySpent | None) -> str:
    """Return what was charged to an account until now, against the lifetime budget of its data."""
    if spent is None:
        return "–"
    return epsilon_words(spent.epsilon) + (f" / {spent.budget:g}" if spent.budget is not None else "")


def terms_words(spent: list[PrivacySpent]) -> str:
    """Return what stands beside every epsilon: unit, delta, adjacency."""
    deltas = sorted({f"{s.delta:.2g}".replace("e-0", "e-") for s in spent}, key=float)
    delta = [f"delta={deltas[0]}" if len(deltas) == 1 else f"delta={deltas[0]} to {deltas[-1]}"] if deltas else []
    units = sorted({s.unit for s in spent}) or ["patient"]
    adjacencies = sorted({s.adjacency.replace("_", "/") for s in spent}) or ["add/remove"]
    return ", ".join([" and ".join(units), *delta, " and ".join(adjacencies)])


def budget_words(spent: list[PrivacySpent], run: RunConfig) -> str:
    """Say which budget bounds what: the run's its rounds, the lifetime budget of the data everything shown."""
    own = run.privacy.epsilon
    budgets = sorted({s.budget for s in spent if s.budget is not None})
    words = ["no budget of the run" if own is None or not run.privacy.enable_dp else f"budget of the run {own:g}"]
    if budgets:
        words.append("lifetime budget " + " to ".join(f"{b:g}" for b in dict.fromkeys((budgets[0], budgets[-1]))))
    return ", ".join(words)


def clock_words(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
