"""What the runs of simulation.py come to: ratios within a turn, their medians, and the page of tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Goal

NAMES = {
    "raw": "PyTorch loop without a framework, 2 processes of 1 thread",
    "pfl": "pfl-research, 2 processes of 1 thread",
    "flower": "Flower simulation, NumPyClient, 2 actors of 1 thread",
    "ours": "medfl-ray",
    "exact": "medfl-ray, federation.exact",
    "bf16": "medfl-ray, training.mixed_precision",
}
PEERS = ("raw", "pfl", "flower")
SAME_RESULT = ("ours", "exact")
"""Those whose final weights are to be raw's; bfloat16 computes something else."""


@dataclass(frozen=True)
class Run:
    """One measured command: its case, contender and turn, and what the peers' measure.py said of it."""

    case: str
    contender: str
    turn: int
    record: Mapping[str, Any]

    @property
    def failure(self) -> str:
        """Why the run does not count; empty if it does."""
        if self.record["timed_out"]:
            return "it took too long and was ended"
        if self.record["rc"] != 0:
            return f"it ended with exit code {self.record['rc']}"
        return "" if self.record["rounds"] else "it reported no round"

    @property
    def round_s(self) -> float:
        """Mean wall seconds of a round, start-up and warm-up left out."""
        return float(self.record["rounds_wall"]) / len(self.record["rounds"])

    @property
    def first_round_s(self) -> float:
        """Seconds from the start of the command to the end of its first round, which is the warm-up."""
        return float(self.record["ready"]) + float(self.record["warm_wall"][0])

    @property
    def peak_pss_mb(self) -> float:
        """Peak proportional memory of all its processes."""
        return float(self.record["peak_pss_mb"])


@dataclass(frozen=True)
class Ratio:
    """A figure: `value` of one contender over that of another in the same turn of a case."""

    case: str
    above: str
    below: str
    value: Callable[[Run], float]

    def of(self, runs: Iterable[Run]) -> list[float]:
        """Return the ratio of every turn that both have finished."""
        done = {(run.contender, run.turn): run for run in runs if run.case == self.case and not run.failure}
        turns = sorted({turn for contender, turn in done if contender == self.above})
        return [
            self.value(done[self.above, turn]) / self.value(done[self.below, turn])
            for turn in turns
            if (self.below, turn) in done
        ]


def _round_s(run: Run) -> float:
    return run.round_s


RATIOS: dict[str, Ratio] = {
    **{
        f"{case.lower()}_vs_{peer}": Ratio(case, peer, "ours", _round_s)
        for case in ("S1", "S2", "S3")
        for peer in PEERS
    },
    "s3_bf16_vs_raw": Ratio("S3", "raw", "bf16", _round_s),
    "exact_vs_raw": Ratio("S1", "raw", "exact", _round_s),
    "first_round_vs_flower": Ratio("S1", "ours", "flower", lambda run: run.first_round_s),
    "s2_peak_pss_vs_flower": Ratio("S2", "ours", "flower", lambda run: run.peak_pss_mb),
}
GOALS = (
    Goal("s1_vs_raw", at_least=1.75),
    Goal("s1_vs_pfl", at_least=1.7),
    Goal("s1_vs_flower", at_least=3.2),
    Goal("s2_vs_raw", at_least=1.8),
    Goal("s2_vs_pfl", at_least=2.0),
    Goal("s2_vs_flower", at_least=3.3),
    Goal("s3_vs_raw", at_least=1.7),
    Goal("s3_vs_pfl", at_least=1.7),
    Goal("s3_vs_flower", at_least=1.7),
    Goal("s3_bf16_vs_raw", at_least=2.3),
    Goal("exact_vs_raw", at_least=0.95),
    Goal("first_round_vs_flower", at_most=0.75),
    Goal("s2_peak_pss_vs_flower", at_most=0.7),
    Goal("weights_error", at_most=1e-4),
)


def goals_here(cpu_flags: Iterable[str]) -> tuple[Goal, ...]:
    """Return the goals that hold on this processor: bfloat16 is asked for only where it computes in it."""
    if {"avx512_bf16", "amx_bf16"} & set(cpu_flags):
        return GOALS
    return tuple(goal for goal in GOALS if goal.figure != "s3_bf16_vs_raw")


def update_error(
    weights: npt.NDArray[np.float32], raw: npt.NDArray[np.floating[Any]], initial: npt.NDArray[np.float32]
) -> float:
    """Return the norm of the difference between final weights [P] and raw's, over the norm of raw's whole update."""
    raw64 = raw.astype(np.float64)
    return float(np.linalg.norm(weights - raw64) / np.linalg.norm(raw64 - initial))


def figures_of(runs: Sequence[Run], errors: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the median of every ratio that was measured, and the worst difference of the weights.

    Args:
      errors: (case, contender) to the worst `update_error` of its turns.
    """
    figures = {name: statistics.median(values) for name, ratio in RATIOS.items() if (values := ratio.of(runs))}
    own = [error for (_, contender), error in errors.items() if contender in SAME_RESULT]
    if own:
        figures["weights_error"] = max(own) if all(map(math.isfinite, own)) else math.nan
    return figures


def page(
    runs: Sequence[Run],
    errors: Mapping[tuple[str, str], float],
    goals: Sequence[Goal],
    machine: str,
    notes: Sequence[str],
) -> str:
    """Return the tables as Markdown: every figure with its range and goal, then every contender of every case."""
    lines = [
        "# A simulation beside its peers",
        "",
        f"Written by `benchmarks/simulation.py`. {machine}.",
        "",
        *_figure_table(runs, errors, {goal.figure: goal for goal in goals}),
        "",
        "`_vs_` is the peer's seconds per round over ours, so that 2 is twice as fast; `first_round_vs_flower` and",
        "`s2_peak_pss_vs_flower` are ours over Flower's. A ratio is taken within a turn, in which every contender runs",
        "once; the figure is the median over turns.",
        "",
        *_run_table(runs, errors),
        "",
        *(f"- `{name}`: {NAMES[name]}." for name in dict.fromkeys(run.contender for run in runs)),
        "",
        "Seconds are wall time; processor time and memory are those of all processes of the command. First round: from",
        "the start of the command to the end of the warm-up round, which the other columns leave out. Load: 1-minute",
        "load average before the start. Busy: cores that other programs kept busy meanwhile. Weights: distance of the",
        "final weights from raw's, over the length of raw's whole update.",
    ]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _figure_table(runs: Sequence[Run], errors: Mapping[tuple[str, str], float], goals: Mapping[str, Goal]) -> list[str]:
    lines = ["| figure | median | range | turns | goal | |", "|---|---|---|---|---|---|"]
    figures = figures_of(runs, errors)
    for name in [*RATIOS, "weights_error"]:
        goal = goals.get(name)
        wanted = "" if goal is None else str(goal)
        if name not in figures:
            lines.append(f"| `{name}` | - | - | 0 | {wanted} | not measured |")
            continue
        values = RATIOS[name].of(runs) if name in RATIOS else []
        spread = f"{min(values):.3g} to {max(values):.3g}" if values else "worst"
        verdict = "" if goal is None else "holds" if goal.holds(figures[name]) else "falls short"
        lines.append(f"| `{name}` | {figures[name]:.3g} | {spread} | {len(values) or ''} | {wanted} | {verdict} |")
    return lines


def _run_table(runs: Sequence[Run], errors: Mapping[tuple[str, str], float]) -> list[str]:
    lines = [
        "| case | contender | runs | s per round | range | clients/s | first round s | processor s | peak PSS MB "
        "| load | busy | weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, contender in dict.fromkeys((run.case, run.contender) for run in runs):
        every = [run for run in runs if (run.case, run.contender) == (case, contender)]
        done = [run for run in every if not run.failure]
        if not done:
            lines.append(f"| {case} | {contender} | failed: {every[-1].failure} | | | | | | | | | |")
            continue
        seconds = [run.round_s for run in done]
        cells = [
            f"{len(done)}" if len(done) == len(every) else f"{len(done)} of {len(every)}",
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f} to {max(seconds):.3f}",
            f"{statistics.median(float(run.record['clients_per_s']) for run in done):.3g}",
            f"{statistics.median(run.first_round_s for run in done):.1f}",
            f"{statistics.median(float(run.record['cpu']) for run in done):.1f}",
            f"{statistics.median(run.peak_pss_mb for run in done):.0f}",
            _spread(float(run.record["load_before"]) for run in done),
            _spread(float(run.record["other_busy"]) for run in done),
            f"{errors[case, contender]:.1e}" if (case, contender) in errors else "",
        ]
        lines.append(f"| {case} | {contender} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: Iterable[float]) -> str:
    numbers = list(values)
    return f"{min(numbers):.1f} to {max(numbers):.1f}"


def weights_errors(
    runs: Sequence[Run], folder: Path, initial: Callable[[str], npt.NDArray[np.float32]]
) -> dict[tuple[str, str], float]:
    """Return (case, contender) to the worst distance of its final weights from raw's in the same turn.

    Args:
      folder: holds `<case>.<contender>.<turn>.npy`.
      initial: returns the first weights [P] of a case.
    """
    errors: dict[tuple[str, str], float] = {}
    for run in runs:
        own, raw = (folder / f"{run.case}.{contender}.{run.turn}.npy" for contender in (run.contender, "raw"))
        if run.contender == "raw" or run.failure or not own.is_file() or not raw.is_file():
            continue
        error = update_error(np.load(own), np.load(raw), initial(run.case))
        before = errors.get((run.case, run.contender), 0.0)
        errors[run.case, run.contender] = error if math.isnan(error) else max(before, error)
    return errors
